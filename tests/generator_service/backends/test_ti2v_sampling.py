"""The loop alone, with a model that is written by hand."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler

from generator_service.backends.ti2v_sampling import Continuation, Process
from tests.generator_service.tiny_sd import scheduler

# raised inside diffusers' Euler samplers, for torch and numpy 2 together
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

KINDS = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler, "euler-a": EulerAncestralDiscreteScheduler}
SHAPE = (4, 8, 8)
WINDOW = 4


def begin(kind: str = "ddim", steps: int = 3, resampling: int = 0) -> Process:
    config = scheduler("epsilon").config
    return Process.begin(lambda: KINDS[kind].from_config(config), steps, resampling, torch.device("cpu"))


class Model:
    """Says a multiple of the mean over the window, and keeps what it is shown."""

    def __init__(self, factor: float = 0.5):
        self.factor, self.seen = factor, []

    def __call__(self, latents: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        self.seen.append((latents.clone(), times.clone()))
        return self.factor * latents.mean(dim=2, keepdim=True).expand_as(latents)


def run(process: Process, model, first: torch.Tensor, frames: int = 6, scale: float = 1.0, seed: int = 0):
    sources = [torch.Generator().manual_seed(seed + row) for row in range(len(first))]
    told = []
    made = Continuation(process, model, sources, lambda: told.append(None)).frames(
        first, torch.full((len(first), frames), scale), WINDOW
    )
    assert len(told) == len(model.seen) == process.calls * (frames - 1)
    return made


def images(count: int = 1, seed: int = 3) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


class TestQueue:
    @pytest.mark.parametrize("kind", KINDS)
    def test_holds_the_last_frames_and_slides(self, kind, monkeypatch):
        """Without the noise, what stands in the first places is the queue."""
        monkeypatch.setattr(Continuation, "_drawn", lambda self, like: torch.zeros_like(like))
        process, model, first = begin(kind), Model(), images(2)
        made = run(process, model, first)
        history = torch.cat([first[:, None].expand(-1, WINDOW - 1, -1, -1, -1), made], dim=1).transpose(1, 2)
        for frame in range(5):
            for step in range(3):
                shown, _ = model.seen[frame * 3 + step]
                scaled = process.samplers[0].sigmas[step] if kind != "ddim" else None
                signal = process.signal[step] if scaled is None else 1 / (scaled**2 + 1).sqrt()
                torch.testing.assert_close(
                    shown[:, :, :-1], signal * history[:, :, frame : frame + WINDOW - 1], atol=1e-5, rtol=1e-5
                )

    def test_a_frame_goes_on_from_the_one_before(self):
        """A model that sees the window alone: when a frame is moved, so are those after it, and none before."""
        plain = run(begin(), Model(), images())

        class Moved(Model):
            def __call__(self, latents, times):
                said = super().__call__(latents, times)
                return said + 0.1 * (6 < len(self.seen) <= 9)  # the third of the frames that are made

        moved = run(begin(), Moved(), images())
        assert torch.equal(moved[:, :2], plain[:, :2])
        assert ((moved[:, 2:] - plain[:, 2:]).abs().amax(dim=(0, 2, 3, 4)) > 1e-3).all()


class TestNoise:
    @pytest.mark.parametrize("kind", ["ddim", "euler"])
    @pytest.mark.parametrize("resampling", [0, 1])
    def test_of_the_given_frames_is_that_of_the_step(self, kind, resampling):
        """Eq. 5: (s_t - signal s_0) / noise is standard normal, anew in each step."""
        process, model, first = begin(kind, resampling=resampling), Model(0.0), images(16)
        run(process, model, first, frames=2)
        drawn = []
        for call, (shown, times) in enumerate(model.seen):
            step = call // (1 + resampling)
            assert (times == process.times[step]).all()
            if kind == "euler":
                shown = shown * (process.noise[step] ** 2 + 1) ** 0.5
            drawn.append((shown[:, :, :-1] - process.signal[step] * first[:, :, None]) / process.noise[step])
        for noise in drawn:
            assert noise.mean().abs() < 0.03 and (noise.std() - 1).abs() < 0.03
        correlation = torch.corrcoef(torch.stack([noise.flatten() for noise in drawn]))
        assert (correlation - torch.eye(len(drawn))).abs().max() < 0.05

    def test_levels_are_those_of_the_schedule(self):
        process = begin(steps=4)
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        alphas = (1 - betas).cumprod(0)
        assert process.times.tolist() == [751, 501, 251, 1]
        expected = alphas[[751, 501, 251, 1, 0]]
        torch.testing.assert_close(
            torch.tensor(process.signal, dtype=torch.float64), expected.sqrt(), atol=1e-5, rtol=0
        )
        torch.testing.assert_close(
            torch.tensor(process.noise, dtype=torch.float64), (1 - expected).sqrt(), atol=1e-5, rtol=0
        )

    @pytest.mark.parametrize("kind", ["ddim", "euler"])
    def test_re_noising_comes_back_to_the_level_of_the_step(self, kind):
        """q(z_t | z_t-1) q(z_t-1 | z_0) = q(z_t | z_0): the mean in one go, and the variance of two draws together."""
        process = begin(kind)
        zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        for step in range(3):
            after = step + 1
            mean = process.renoised(process.signal[after] * one, zero, step)
            carried, added = process.renoised(process.noise[after] * one, zero, step), process.renoised(zero, one, step)
            assert mean.item() == pytest.approx(process.signal[step], rel=1e-6)
            assert (carried**2 + added**2).item() == pytest.approx(process.noise[step] ** 2, rel=1e-6)

    def test_the_new_frame_starts_as_the_last_one_before_it(self):
        """Section 3.1: with s_T of the last condition, in the same noise."""
        model = Model()
        run(begin(), model, images(2), frames=3)
        for frame in range(2):
            shown, _ = model.seen[frame * 3]
            assert torch.equal(shown[:, :, -1], shown[:, :, -2])
            assert not torch.equal(shown[:, :, -2], shown[:, :, -3])


class TestGuidance:
    def test_of_each_frame_joins_two_passes(self):
        """A model that says 1 with the text and 0 without says the frame's scale."""
        said, scales = [], torch.tensor([[9.0, 1.0, 2.0, 5.0], [9.0, 3.0, 4.0, 0.5]])

        def model(latents, times):
            assert len(latents) == len(times) == 4
            return torch.cat([torch.ones_like(latents[:2]), torch.zeros_like(latents[:2])])

        process = begin(steps=2)
        step = process.samplers[0].step
        process.samplers[0].step = lambda output, *rest, **more: (
            said.append(output[:, 0, 0, 0]) or step(output, *rest, **more)
        )
        sources = [torch.Generator().manual_seed(row) for row in range(2)]
        Continuation(process, model, sources, lambda: None).frames(images(2), scales, WINDOW)
        expected = [[1, 3], [1, 3], [2, 4], [2, 4], [5, 1], [5, 1]]
        assert torch.stack(said).tolist() == expected

    def test_frames_without_it_take_one_pass(self):
        model, scales = Model(), torch.tensor([[9.0, 1.0, 2.0, 0.0]])
        Continuation(begin(steps=2), model, [torch.Generator().manual_seed(0)], lambda: None).frames(
            images(), scales, WINDOW
        )
        assert [len(shown) for shown, _ in model.seen] == [1, 1, 2, 2, 1, 1]
