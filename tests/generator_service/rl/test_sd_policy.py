from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

from generator_service.backends.interface import Row, Sampling
from generator_service.rl.sd_policy import StableDiffusionPolicy
from protocol.errors import InvalidRequest, WeightsCorrupt
from protocol.tuning import PolicyOptions, RolloutOptions, TuneJob
from tests.generator_service.rl.test_dit_policy import same, shaken, snapshot
from tests.generator_service.tiny_sd import WIDTH, full, lora_set, open_backend, save_checkpoint, save_lora

CLASSES = ("cat", "dog")
PROMPTS = ["an owl, cat", "an owl, dog", "an owl, dog"]
TIMES = torch.tensor([900, 400, 20])
LABELS = torch.tensor([0, 1, 1])
MEANS = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0))
GUIDED = Sampling(3, "ddim", guided=True)
ROWS = [Row(seed=seed, label=None, guidance_scale=2.0, prompt="an owl") for seed in (1, 2)]


def job(parameters: str = "lora", rank: int = 2) -> TuneJob:
    rollout = RolloutOptions(prompt="an owl, {class_name}")
    return TuneJob(name="tuned", policy=PolicyOptions(parameters=parameters, rank=rank), seed=3, rollout=rollout)


def noise(seed: int = 0) -> torch.Tensor:
    return torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def backend(folder):
    return open_backend(folder)


@pytest.fixture(scope="module")
def tokened(backend, tmp_path_factory):
    """A LoRA with visual tokens, whose alpha is not its rank."""
    base = full(backend)
    folder = save_lora(tmp_path_factory.mktemp("tokened"), backend.checkpoint(base).unet, 5, MEANS)
    return lora_set(base, folder, CLASSES, "class")


def expected_predictions(checkpoint, scale, visual=None):
    """Both passes apart from one another, as the formula of guidance has them."""
    latents = noise()
    told = checkpoint.conditions(PROMPTS, visual)
    with torch.no_grad():
        if scale <= 1:
            return checkpoint.predict(latents, TIMES, told)
        c = checkpoint.predict(latents, TIMES, told)
        u = checkpoint.predict(latents, TIMES, checkpoint.conditions([None] * 3))
        return u + scale * (c - u)


class TestPredictions:
    @pytest.mark.parametrize("parameters", ["lora", "full"])
    @pytest.mark.parametrize("xl", [False, True])
    @pytest.mark.parametrize("scale", [1.0, 3.5])
    def test_at_the_start_they_are_the_backends(self, backend, tmp_path, parameters, xl, scale):
        backend = open_backend(save_checkpoint(tmp_path, xl=True)) if xl else backend
        checkpoint = backend.checkpoint(full(backend))
        checkpoint.use(None)
        expected = expected_predictions(checkpoint, scale)
        opened = StableDiffusionPolicy.opened(backend, full(backend), CLASSES, job(parameters))
        with opened as policy, policy.in_use():
            got = policy.predict(noise(), TIMES, LABELS, scale)
            torch.testing.assert_close(got, expected, atol=1e-5 if scale > 1 else 0, rtol=0)
            assert torch.equal(policy.reference(noise(), TIMES, LABELS, scale), got.detach())
            with torch.no_grad():
                assert torch.equal(policy.predict(noise(), TIMES, LABELS, scale), got)
            assert got.requires_grad and not policy.learned_variance

    def test_guided_passes_are_one_call_and_prompts_are_encoded_once(self, backend, monkeypatch):
        checkpoint, calls = backend.checkpoint(full(backend)), []
        with StableDiffusionPolicy.opened(backend, full(backend), CLASSES, job()) as policy, policy.in_use():
            predict = checkpoint.predict
            monkeypatch.setattr(
                checkpoint, "predict", lambda latents, *given: calls.append(len(latents)) or predict(latents, *given)
            )
            monkeypatch.setattr(checkpoint, "_prompts", None)
            policy.predict(noise(), TIMES, LABELS, 2.0)
            policy.reference(noise(), TIMES, LABELS, 2.0)
            policy.predict(noise(), TIMES, LABELS, 1.0)
        assert calls == [6, 6, 3]

    def test_a_lora_goes_on_from_the_bases_with_its_tokens(self, backend, tokened):
        backend.load(tokened)
        checkpoint = backend.checkpoint(tokened)
        adapter = next(name for name in checkpoint.unet.peft_config)
        checkpoint.use(adapter)
        expected = expected_predictions(checkpoint, 1.0, MEANS[LABELS])
        checkpoint.use(None)
        plain = expected_predictions(checkpoint, 1.0, MEANS[LABELS])
        with StableDiffusionPolicy.opened(backend, tokened, CLASSES, job(rank=7)) as policy, policy.in_use():
            assert {min(value.shape) for value in policy.parameters.values()} == {4}  # its rank is kept
            assert torch.equal(policy.predict(noise(), TIMES, LABELS, 1.0), expected)
            shaken(policy, size=0.2)
            assert torch.equal(policy.reference(noise(), TIMES, LABELS, 1.0), expected)
            got = policy.predict(noise(), TIMES, LABELS, 1.0)
            assert (got - expected).abs().max() > 1e-2 and (expected - plain).abs().max() > 1e-2


class TestGradients:
    @pytest.mark.parametrize("parameters", ["lora", "full"])
    def test_agree_with_finite_differences(self, backend, parameters):
        opened = StableDiffusionPolicy.opened(backend, full(backend), CLASSES, job(parameters))
        with opened as policy, policy.in_use():
            shaken(policy, size=0.3 if parameters == "lora" else 0.01)
            direction = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))

            def loss() -> torch.Tensor:
                return (policy.predict(noise(), TIMES, LABELS, 2.0) * direction).double().sum()

            loss().backward()
            assert all(value.grad is not None for value in policy.parameters.values())
            checked = [name for name in policy.parameters if "mid_block.attentions.0" in name and "attn2" in name]
            assert len(checked) >= 4
            for name in checked[:6]:
                value, step = policy.parameters[name], 1e-2
                along = torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
                along /= along.norm()
                slope = (value.grad * along).sum().item()
                with torch.no_grad():
                    value.add_(along, alpha=step)
                    above = loss().item()
                    value.add_(along, alpha=-2 * step)
                    below = loss().item()
                    value.add_(along, alpha=step)
                assert (above - below) / (2 * step) == pytest.approx(slope, rel=0.02, abs=0.02), name

    @pytest.mark.parametrize("parameters", ["lora", "full"])
    def test_what_is_trained_is_float32_on_a_backend_of_half_precision(self, folder, parameters):
        backend = open_backend(folder, dtype="bfloat16")
        opened = StableDiffusionPolicy.opened(backend, full(backend), CLASSES, job(parameters))
        with opened as policy, policy.in_use():
            got = policy.predict(noise(), TIMES, LABELS, 2.0)
            assert torch.equal(got, policy.reference(noise(), TIMES, LABELS, 2.0))
            got.sum().backward()
            assert all(value.grad.dtype == torch.float32 for value in policy.parameters.values())


class TestTheBackendBetween:
    @pytest.mark.parametrize("parameters", ["lora", "full"])
    def test_serves_others_as_before_while_it_is_open(self, folder, tokened, parameters):
        backend = open_backend(folder)
        sets = [full(backend), tokened]
        before = [backend.sample(weights, ROWS, GUIDED) for weights in sets]
        with StableDiffusionPolicy.opened(backend, full(backend), CLASSES, job(parameters)) as policy:
            shaken(policy, size=0.3)
            for _ in range(2):
                with policy.in_use():
                    tuned = policy.predict(noise(), TIMES, LABELS, 2.0)
                for weights, images in zip(sets, before, strict=True):
                    assert torch.equal(backend.sample(weights, ROWS, GUIDED), images)
                with policy.in_use():
                    assert torch.equal(policy.predict(noise(), TIMES, LABELS, 2.0), tuned)
        for weights, images in zip(sets, before, strict=True):
            assert torch.equal(backend.sample(weights, ROWS, GUIDED), images)

    @pytest.mark.parametrize(
        ("parameters", "based", "served"),
        [
            ("lora", "checkpoint", False),
            ("lora", "checkpoint", True),
            ("lora", "lora", True),
            ("full", "checkpoint", True),
        ],
    )
    @pytest.mark.parametrize("end", ["whole", "failed in use"])
    def test_the_unet_is_as_it_was(self, folder, tokened, parameters, based, served, end):
        """served: a LoRA was resident before."""
        backend = open_backend(folder)
        backend.load(tokened if served else full(backend))
        checkpoint = backend.checkpoint(full(backend))
        checkpoint.use(None)
        before = snapshot(checkpoint.unet)
        base = tokened if based == "lora" else full(backend)
        with ExitStack() as stack:
            if end != "whole":
                stack.enter_context(pytest.raises(ZeroDivisionError))
            policy = stack.enter_context(StableDiffusionPolicy.opened(backend, base, CLASSES, job(parameters)))
            shaken(policy)
            with policy.in_use():
                policy.predict(noise(), TIMES, LABELS, 2.0).sum().backward()
                if end != "whole":
                    raise ZeroDivisionError
        assert same(snapshot(checkpoint.unet), before)


class TestState:
    @pytest.mark.parametrize("parameters", ["lora", "full"])
    def test_comes_back_to_the_bit_in_another_process(self, folder, parameters):
        backend, other = open_backend(folder), open_backend(folder)
        opened = StableDiffusionPolicy.opened(backend, full(backend), CLASSES, job(parameters))
        with opened as policy, policy.in_use():
            shaken(policy)
            state, expected = policy.state(), policy.predict(noise(), TIMES, LABELS, 2.0)
            shaken(policy, seed=2)
        wanted = job(parameters).model_copy(update={"seed": 99})
        opened = StableDiffusionPolicy.opened(other, full(other), CLASSES, wanted)
        with opened as second, second.in_use():
            second.restore(state)
            assert all(torch.equal(value, state[name]) for name, value in second.state().items())
            assert torch.equal(second.predict(noise(), TIMES, LABELS, 2.0), expected)


class TestRefusals:
    def refused(self, backend, base, classes, wanted, error, words):
        with pytest.raises(error, match=words) as raised, StableDiffusionPolicy.opened(backend, base, classes, wanted):
            pass
        return raised.value

    def test_visual_tokens_of_other_classes(self, backend, tokened):
        error = self.refused(backend, tokened, ("dog", "cat"), job(), InvalidRequest, "visual tokens of other classes")
        assert error.param == "base"

    def test_all_parameters_of_a_lora(self, backend, tokened):
        error = self.refused(
            backend, tokened, CLASSES, job("full"), InvalidRequest, 'parameters = "lora", or give base'
        )
        assert error.param == "base"

    def test_tokens_that_are_damaged(self, backend, tokened, tmp_path):
        folder = save_lora(tmp_path / "lora", backend.checkpoint(full(backend)).unet, 5, MEANS * torch.nan)
        damaged = lora_set(full(backend), folder, CLASSES, "class")
        self.refused(backend, damaged, CLASSES, job(), WeightsCorrupt, "no finite table")
