from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from generator_service.backends.interface import Row, Sampling, WeightSet
from generator_service.backends.ti2v_sampling import SAMPLERS
from generator_service.rl.sampling_policy import SamplingPolicy, Sizes, write_policy
from protocol.errors import Cancelled, ConfigError, InvalidRequest, UnknownClass, UnsupportedField, WeightsCorrupt
from protocol.messages import WeightsRef
from protocol.policy import ActionSpace
from protocol.video import GuidanceCurve
from tests.generator_service import tiny_sd
from tests.generator_service.backends.plain_ti2v import PlainTI2V
from tests.generator_service.tiny_t2v import full, open_backend, save_checkpoint

# raised inside diffusers' Euler samplers, for torch and numpy 2 together
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

WINDOW = 4
NEAR = {"atol": 5e-4, "rtol": 1e-3}
CURVE = GuidanceCurve(minimum=2.0, maximum=30.0, a=3.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("t2v"))


@pytest.fixture(scope="module")
def backend(folder):
    return open_backend(folder, window=WINDOW)


@pytest.fixture(scope="module")
def base(backend):
    return full(backend)


def picture(seed: int, size: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def sampling(frames: int = 3, steps: int = 2, scheduler: str = "ddim", **more) -> Sampling:
    return Sampling(steps, scheduler, guided=True, frames=frames, **more)


ROWS = [
    Row(1, None, 7.0, "an owl", "blurry", picture(1)),
    Row(2, None, 1.0, "a cat", None, picture(2), CURVE),
    Row(3, None, 9.0, "dogs, 3 of them", None, picture(3)),
]


class Counted:
    """Batch sizes of the calls of a module's method."""

    def __init__(self, monkeypatch, module, name: str):
        self.sizes = []
        plain = getattr(module, name)

        def counted(batch, *args, **kwargs):
            self.sizes.append(len(batch))
            return plain(batch, *args, **kwargs)

        monkeypatch.setattr(module, name, counted)


class TestAgainstThePaperWrittenOut:
    @pytest.mark.parametrize(
        ("frames", "resampling"), [(6, 0), (3, 2)], ids=["longer than the window", "shorter, with resampling"]
    )
    def test_frames(self, backend, base, folder, frames, resampling):
        plain, rows = PlainTI2V(folder, WINDOW), ROWS[:2]
        got = backend.sample(base, rows, sampling(frames, 2, resampling=resampling))
        for row, latents in zip(rows, got, strict=True):
            torch.testing.assert_close(latents, plain.latents(row, frames, 2, resampling), atol=2e-4, rtol=1e-4)

    def test_pixels(self, backend, base, folder):
        got = backend.generate(base, ROWS[:1], sampling(4, 3))[0]
        expected = PlainTI2V(folder, WINDOW)(ROWS[0], 4, 3)
        assert got.dtype == np.uint8 and got.shape == (4, 32, 32, 3)
        assert np.abs(got.astype(int) - expected).max() <= 1
        np.testing.assert_array_equal(got[0], picture(1))

    def test_velocity_prediction(self, tmp_path):
        folder = save_checkpoint(tmp_path, prediction="v_prediction")
        backend = open_backend(folder, window=WINDOW)
        got = backend.sample(full(backend), ROWS[1:2], sampling(3, 3))[0]
        expected = PlainTI2V(folder, WINDOW, velocity=True).latents(ROWS[1], 3, 3)
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)

    def test_euler_is_ddim_to_a_clean_end(self, backend, base, folder, monkeypatch):
        """Both take the same straight line in the noise's level; theirs ends without any, DDIM's at that of time 0."""
        plain = PlainTI2V(folder, WINDOW)
        got = backend.sample(base, ROWS[:1], sampling(3, 3, "euler", resampling=1))[0]
        monkeypatch.setattr(plain, "alphas", [1.0, *plain.alphas[1:]])
        torch.testing.assert_close(got, plain.latents(ROWS[0], 3, 3, 1), atol=5e-4, rtol=1e-3)

    def test_counted_passes_and_encodes(self, backend, base, folder, monkeypatch):
        """Two frames of two steps: guidance as two calls makes 8 for a clip, and as many encodes as K a frame."""
        plain = PlainTI2V(folder, WINDOW)
        plain(ROWS[0], 3, 2)
        checkpoint = backend.checkpoint(base)
        calls = Counted(monkeypatch, checkpoint.unet, "forward")
        encodes = Counted(monkeypatch, checkpoint.vae, "encode")
        backend.generate(base, ROWS, sampling(3, 2))
        assert (plain.calls, plain.encodes) == (8, 6)
        assert calls.sizes == [6] * 4 and encodes.sizes == [3]

    def test_rows_that_begin_alike_are_encoded_once(self, backend, base, monkeypatch):
        rows = [replace(ROWS[0], image=picture(seed), seed=at) for at, seed in enumerate((1, 2, 1, 1))]
        apart = torch.cat([backend.state(base, [row])[0] for row in rows])
        encodes = Counted(monkeypatch, backend.checkpoint(base).vae, "encode")
        torch.testing.assert_close(backend.state(base, rows)[0], apart, **NEAR)
        assert encodes.sizes == [2]


class TestRowsAndTheirMates:
    @pytest.mark.parametrize("scheduler", SAMPLERS)
    def test_a_row_does_not_depend_on_its_batch_mates(self, backend, base, scheduler):
        mixed = [ROWS[0], replace(ROWS[1], steps=3), ROWS[2]]
        together = backend.sample(base, mixed, sampling(3, 2, scheduler))
        for row, latents in zip(mixed, together, strict=True):
            torch.testing.assert_close(latents, backend.sample(base, [row], sampling(3, 2, scheduler))[0], **NEAR)
        reversed_ = backend.sample(base, mixed[::-1], sampling(3, 2, scheduler)).flip(0)
        torch.testing.assert_close(together, reversed_, **NEAR)

    def test_equal_to_the_bit_at_equal_shape(self, backend, base):
        first = backend.generate(base, ROWS[:2], sampling(resampling=1))
        backend.generate(base, ROWS, sampling())
        np.testing.assert_array_equal(first, backend.generate(base, ROWS[:2], sampling(resampling=1)))
        mates = backend.generate(base, [ROWS[0], ROWS[2]], sampling(resampling=1))
        np.testing.assert_array_equal(first[0], mates[0])

    def test_every_setting_of_a_row_counts(self, backend, base):
        row = ROWS[0]
        others = [
            replace(row, seed=9),
            replace(row, guidance_scale=12.0),
            replace(row, prompt="a cat"),
            replace(row, negative_prompt=None),
            replace(row, image=picture(8)),
            replace(row, guidance=CURVE),
            replace(row, steps=3),
        ]
        made = backend.sample(base, [row, *others], sampling())
        assert ((made[1:] - made[0]).abs().amax(dim=(1, 2, 3, 4)) > 5e-3).all()

    def test_resampling_counts(self, backend, base):
        none, one, two = (backend.sample(base, ROWS[:1], sampling(resampling=repeats)) for repeats in range(3))
        assert min((none - one).abs().max(), (one - two).abs().max()) > 5e-3

    def test_images_are_resized(self, backend, base):
        large = picture(4, 50)
        fitted = backend.checkpoint(base).fit(large)
        first, second = (
            backend.generate(base, [replace(ROWS[0], image=image)], sampling()) for image in (large, fitted)
        )
        np.testing.assert_array_equal(first, second)
        np.testing.assert_array_equal(first[0, 0], fitted)

    def test_the_length_of_a_clip_changes_its_guidance_alone(self, backend, base):
        """With one scale for all frames, a longer clip begins as a shorter one."""
        short, long = (backend.sample(base, ROWS[:1], sampling(frames)) for frames in (3, 6))
        assert torch.equal(short, long[:, :2])


class TestGuidance:
    def test_off_takes_one_pass(self, backend, base, monkeypatch):
        calls = Counted(monkeypatch, backend.checkpoint(base).unet, "forward")
        off = [replace(row, guidance=None, guidance_scale=1.0) for row in ROWS]
        guided = backend.sample(base, off, sampling())
        unguided = backend.sample(
            base, [replace(row, guidance=None) for row in ROWS], replace(sampling(), guided=False)
        )
        assert calls.sizes == [3] * 8
        assert torch.equal(guided, unguided)

    def test_a_row_without_it_in_a_guided_batch(self, backend, base):
        off = replace(ROWS[0], guidance_scale=0.0)
        together = backend.sample(base, [off, ROWS[1]], sampling())[0]
        torch.testing.assert_close(together, backend.sample(base, [off], sampling())[0], **NEAR)

    def test_a_curve_counts_where_the_batch_says_nothing_of_guidance(self, backend, base):
        """A policy chose it after the batch was put together."""
        got = backend.sample(base, ROWS[1:2], replace(sampling(), guided=False))
        assert torch.equal(got, backend.sample(base, ROWS[1:2], sampling()))


class TestSteps:
    def test_are_told_one_by_one_over_all_groups(self, backend, base):
        told = []
        mixed = [ROWS[0], replace(ROWS[1], steps=3), ROWS[2]]
        backend.sample(base, mixed, sampling(3, 2, resampling=1), lambda *step: told.append(step))
        assert told == [(done, 20) for done in range(1, 21)]  # 2 frames of 2 and of 3 steps, each taken twice

    def test_may_end_it(self, backend, base, monkeypatch):
        calls = Counted(monkeypatch, backend.checkpoint(base).unet, "forward")

        def cancel(done, total):
            if done == 3:
                raise Cancelled("enough")

        with pytest.raises(Cancelled):
            backend.generate(base, ROWS, sampling(4), cancel)
        assert len(calls.sizes) == 3

    def test_too_many_for_one_row_are_refused_before_any_is_made(self, backend, base, monkeypatch):
        calls = Counted(monkeypatch, backend.checkpoint(base).unet, "forward")
        with pytest.raises(InvalidRequest, match="too many") as refused:
            backend.sample(base, [ROWS[0], replace(ROWS[1], steps=1000)], sampling())
        assert refused.value.param == "num_inference_steps" and not calls.sizes


class TestBadInput:
    @pytest.mark.parametrize("frames", [None, 1])
    def test_no_frames_to_make(self, backend, base, frames):
        with pytest.raises(InvalidRequest, match="ask for 2 or more") as refused:
            backend.generate(base, ROWS, replace(sampling(), frames=frames))
        assert refused.value.param == "num_frames"

    def test_a_row_without_an_image(self, backend, base):
        for ask in (lambda rows: backend.generate(base, rows, sampling()), lambda rows: backend.state(base, rows)):
            with pytest.raises(InvalidRequest, match="begins with an image") as refused:
                ask([ROWS[0], replace(ROWS[1], image=None)])
            assert refused.value.param == "image"

    @pytest.mark.parametrize("scheduler", ["dpm-solver", "pndm", "unipc"])
    def test_a_sampler_that_goes_by_the_steps_before(self, backend, base, scheduler):
        with pytest.raises(UnsupportedField, match="use one of ddim, euler, euler-a"):
            backend.generate(base, ROWS, sampling(scheduler=scheduler))

    def test_a_label(self, backend, base):
        with pytest.raises(UnknownClass, match="they know none"):
            backend.generate(base, [replace(ROWS[0], label=0)], sampling())

    def test_a_checkpoint_that_makes_images(self, tmp_path):
        tiny_sd.save_checkpoint(tmp_path)
        with pytest.raises(ConfigError, match="use a text-to-video checkpoint") as refused:
            open_backend(tmp_path)
        assert refused.value.param == "checkpoint"

    def test_weights_of_another_kind(self, backend, base, tmp_path):
        lora = WeightSet(WeightsRef(name="l", version=1, digest="l"), "ti2v", "lora", base, (), tmp_path)
        with pytest.raises(WeightsCorrupt, match="kind 'lora'"):
            backend.load(lora)


class TestSettings:
    @pytest.mark.parametrize(
        "settings", [{"attention": "sliced"}, {"vae_slicing": True}, {"dtype": "bfloat16"}], ids=str
    )
    def test_what_saves_memory_makes_the_same_clips_nearly(self, backend, base, folder, settings):
        other = open_backend(folder, window=WINDOW, **settings)
        got, expected = (one.generate(base, ROWS[:1], sampling()).astype(int) for one in (other, backend))
        assert np.abs(got - expected).max() <= (24 if "dtype" in settings else 1)

    def test_the_window(self, backend, base, folder):
        """The UNet sees as many frames as it says, and that matters."""
        wide = open_backend(folder)
        seen = []
        handle = wide.checkpoint(base).unet.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[2]))
        got = wide.sample(base, ROWS[:1], sampling(2, 1))
        handle.remove()
        assert seen == [16]
        assert (got - backend.sample(base, ROWS[:1], sampling(2, 1))).abs().max() > 5e-3

    def test_another_size(self, folder, base):
        other = open_backend(folder, window=WINDOW, image_size=48)
        assert other.native_size() == (48, 48)
        assert other.generate(base, ROWS[:1], sampling(2, 1)).shape == (1, 2, 48, 48, 3)

    def test_another_checkpoint(self, backend, base, tmp_path):
        folder = save_checkpoint(tmp_path, seed=8)
        other = full(backend, folder, "other")
        backend.load(other)
        got = backend.sample(other, ROWS[:1], sampling())
        again = open_backend(folder, window=WINDOW)
        assert torch.equal(got, again.sample(full(again), ROWS[:1], sampling()))
        assert not torch.equal(got, backend.sample(base, ROWS[:1], sampling()))


class TestPolicy:
    @pytest.fixture
    def weights(self, backend, base, tmp_path):
        """A policy that takes 1 step for one picture and 3 for another, whatever the text."""
        (tmp_path / "policy").mkdir()
        space = ActionSpace(steps=[1, 3], pairs=[(2.0, 2.0), (3.0, 2.0)])
        torch.manual_seed(0)
        policy = SamplingPolicy(Sizes(actions=space, method="reinforce", channels=4, text_width=tiny_sd.WIDTH))
        states = backend.state(base, [replace(ROWS[0], image=picture(seed)) for seed in (1, 2)])
        optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
        for _ in range(40):
            optimizer.zero_grad()
            torch.nn.functional.nll_loss(policy(*states), torch.tensor([0, 3])).backward()
            optimizer.step()
        write_policy(tmp_path / "policy", policy)
        ref = WeightsRef(name="p", version=1, digest="p")
        return WeightSet(ref, "ti2v", "policy", base, (), tmp_path / "policy")

    def test_chooses_steps_and_guidance_of_each_row(self, backend, base, weights):
        backend.load(weights)
        rows = [replace(ROWS[0], image=picture(seed)) for seed in (2, 1)]
        chosen = backend.chosen(weights, rows, sampling(policy=True))
        assert [row.steps for row in chosen] == [3, 1]
        assert [(row.guidance.a, row.guidance.b) for row in chosen] == [(3.0, 2.0), (2.0, 2.0)]
        assert [replace(row, steps=None, guidance=None) for row in chosen] == rows
        made = backend.sample(weights, chosen, sampling(policy=True))
        for row, latents in zip(chosen, made, strict=True):
            alone = backend.sample(base, [row], sampling(steps=row.steps))[0]
            torch.testing.assert_close(latents, alone, **NEAR)

    def test_is_asked_only_where_it_is_wanted(self, backend, weights):
        assert backend.chosen(weights, ROWS, sampling()) is ROWS

    def test_weights_that_have_none(self, backend, base):
        with pytest.raises(InvalidRequest, match="have no policy") as refused:
            backend.chosen(base, ROWS, sampling(policy=True))
        assert refused.value.param == "model"

    def test_damaged_files(self, backend, weights):
        (weights.folder / "policy.safetensors").write_bytes(b"{}")
        with pytest.raises(WeightsCorrupt, match=r"policy\.safetensors"):
            backend.load(replace(weights, ref=WeightsRef(name="p", version=2, digest="q")))

    def test_one_of_another_checkpoint(self, backend, weights, tmp_path):
        (tmp_path / "wide").mkdir()
        sizes = Sizes(actions=ActionSpace(), method="reinforce", channels=4, text_width=tiny_sd.WIDTH + 8)
        write_policy(tmp_path / "wide", SamplingPolicy(sizes))
        with pytest.raises(WeightsCorrupt, match=f"width {tiny_sd.WIDTH + 8}.*learn it again"):
            ref = WeightsRef(name="wide", version=1, digest="w")
            backend.load(replace(weights, ref=ref, folder=tmp_path / "wide"))

    def test_the_least_recently_used_leaves_memory(self, folder, base, weights):
        backend = open_backend(folder, max_resident=1)
        backend.load(weights)
        first = backend._policies[weights.ref]
        backend.load(replace(weights, ref=WeightsRef(name="p", version=2, digest="q")))
        backend.load(weights)
        assert list(backend._policies) == [weights.ref] and backend._policies[weights.ref] is not first

    def test_looks_at_latents_and_text(self, backend, base, folder):
        latents, text = backend.state(base, ROWS)
        plain = PlainTI2V(folder, WINDOW)
        with torch.no_grad():
            for at, row in enumerate(ROWS):
                torch.testing.assert_close(latents[at], plain.encode(row.image), atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(text[at], plain.embed(row.prompt)[0], atol=1e-5, rtol=1e-5)
