from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from torch import nn

from generator_service.backends.dit_checkpoint import write_tables
from generator_service.backends.interface import Row, Sampling
from generator_service.rl.dit_policy import DiTPolicy
from generator_service.rl.trained import FullWeights, LoraWeights
from protocol.errors import InvalidRequest, WeightsCorrupt
from protocol.tuning import PolicyOptions, TuneJob
from tests.generator_service.tiny_dit import CLASSES, class_embedding, full, open_backend, save_checkpoint

KINDS = ("pixels", "latents")
TIMES = torch.tensor([900, 400, 20])
LABELS = torch.tensor([0, 2, 2])
GUIDED = Sampling(3, "ddim", guided=True)
ROWS = [Row(seed=1, label=0, guidance_scale=2.0), Row(seed=2, label=1, guidance_scale=2.0)]


def job(parameters: str = "lora", rank: int = 2, **more) -> TuneJob:
    return TuneJob(name="tuned", policy=PolicyOptions(parameters=parameters, rank=rank), seed=3, **more)


def noise(policy: DiTPolicy, seed: int = 0) -> torch.Tensor:
    return torch.randn(len(LABELS), *policy.space.latent_shape, generator=torch.Generator().manual_seed(seed))


def shaken(policy: DiTPolicy, seed: int = 1, size: float = 0.05) -> None:
    """Move every parameter, as training would."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in policy.parameters.values():
            value.add_(torch.randn(value.shape, generator=rng) * size)


def snapshot(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, bool], object, list[str]]:
    """All that others would notice: parameters, flags, adapters, modules."""
    values = {name: value.detach().clone() for name, value in model.named_parameters()}
    flags = {name: value.requires_grad for name, value in model.named_parameters()}
    adapters = sorted(getattr(model, "peft_config", {}))
    return values, flags, adapters, [f"{name} {type(module)}" for name, module in model.named_modules()]


def same(first, second) -> bool:
    values = all(torch.equal(value, second[0][name]) for name, value in first[0].items())
    return values and first[0].keys() == second[0].keys() and first[1:] == second[1:]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model of pixels, and one of latents that has learnt its variance."""
    return {
        "pixels": save_checkpoint(tmp_path_factory.mktemp("pixels")),
        "latents": save_checkpoint(tmp_path_factory.mktemp("latents"), vae=True, learned_sigma=True),
    }


@pytest.fixture(scope="module")
def backends(folders):
    return {kind: open_backend(folder) for kind, folder in folders.items()}


def cold_started(backend, folder, name="started"):
    """A weight set of other classes than the checkpoint's, with random tables."""
    rng, base = torch.Generator().manual_seed(5), full(backend)
    own = backend.checkpoint(base).tables
    tables = {name: torch.randn(3, table.shape[1], generator=rng) * 0.1 for name, table in own.items()}
    write_tables(tables, folder, base.ref.digest)
    return class_embedding(base, folder, ("x", "y"), name)


class TestPredictions:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("parameters", ["lora", "full"])
    @pytest.mark.parametrize("scale", [0.0, 1.0, 3.5])
    def test_at_the_start_they_are_the_backends_and_the_references_to_the_bit(self, backends, kind, parameters, scale):
        backend = backends[kind]
        checkpoint = backend.checkpoint(full(backend))
        with DiTPolicy.opened(backend, full(backend), CLASSES, job(parameters)) as policy:
            latents, channels = noise(policy), checkpoint.latent_shape[0]
            with torch.no_grad():
                if scale <= 1:
                    expected = checkpoint.predict(latents, TIMES, LABELS, checkpoint.tables, variance=True)
                else:
                    both = torch.cat([LABELS, torch.tensor([3, 3, 3])])
                    inputs = torch.cat([latents, latents]), torch.cat([TIMES, TIMES])
                    plain = checkpoint.predict(*inputs, both, checkpoint.tables, variance=True)
                    c, u = plain[:3], plain[3:]
                    expected = c.clone()
                    expected[:, :channels] = u[:, :channels] + scale * (c[:, :channels] - u[:, :channels])
            with policy.in_use():
                got = policy.predict(latents, TIMES, LABELS, scale)
                assert torch.equal(policy.reference(latents, TIMES, LABELS, scale), expected)
                with torch.no_grad():  # as a rollout does: the importance ratio is 1 to the bit
                    assert torch.equal(policy.predict(latents, TIMES, LABELS, scale), got)
            assert torch.equal(got, expected) and got.requires_grad
            assert policy.learned_variance == (kind == "latents")
            assert got.shape[1] == channels * (2 if kind == "latents" else 1)

    def test_guided_passes_are_one_call_and_none_is_wasted(self, backends, monkeypatch):
        backend = backends["pixels"]
        with DiTPolicy.opened(backend, full(backend), CLASSES, job()) as policy, policy.in_use():
            calls, forward = [], policy.space.transformer.forward
            monkeypatch.setattr(
                policy.space.transformer, "forward", lambda *given: calls.append(len(given[0])) or forward(*given)
            )
            policy.predict(noise(policy), TIMES, LABELS, 2.0)
            policy.predict(noise(policy), TIMES, LABELS, 1.0)
            assert calls == [6, 3]

    def test_the_variance_is_dropped_unless_it_is_asked_for(self, backends):
        checkpoint = backends["latents"].checkpoint(full(backends["latents"]))
        latents = torch.randn(3, 4, 8, 8)
        with torch.no_grad():
            whole = checkpoint.predict(latents, TIMES, LABELS, checkpoint.tables, variance=True)
            half = checkpoint.predict(latents, TIMES, LABELS, checkpoint.tables)
        assert whole.shape == (3, 8, 8, 8) and torch.equal(half, whole[:, :4])

    def test_the_reference_stays_and_the_null_class_is_the_bases_own(self, backends, tmp_path):
        backend = backends["pixels"]
        base = cold_started(backend, tmp_path)
        resident = backend.resident(base)
        labels = torch.tensor([0, 1, 1])
        with DiTPolicy.opened(backend, base, ("x", "y"), job()) as policy, policy.in_use():
            latents = noise(policy)
            with torch.no_grad():
                c = resident.checkpoint.predict(latents, TIMES, labels, resident.tables)
                u = resident.checkpoint.predict(latents, TIMES, torch.tensor([2, 2, 2]), resident.tables)
            before = policy.reference(latents, TIMES, labels, 2.0)
            torch.testing.assert_close(before, u + 2.0 * (c - u), atol=1e-5, rtol=0)
            shaken(policy)
            assert torch.equal(policy.reference(latents, TIMES, labels, 2.0), before)
            assert (policy.predict(latents, TIMES, labels, 2.0) - before).abs().max() > 1e-2


class TestGradients:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("parameters", ["lora", "full"])
    def test_agree_with_finite_differences(self, backends, kind, parameters):
        backend = backends[kind]
        with DiTPolicy.opened(backend, full(backend), CLASSES, job(parameters)) as policy, policy.in_use():
            shaken(policy, size=0.3 if parameters == "lora" else 0.02)
            latents = noise(policy)
            direction = torch.randn(policy.predict(latents, TIMES, LABELS, 2.0).shape)

            def loss() -> torch.Tensor:
                return (policy.predict(latents, TIMES, LABELS, 2.0) * direction).double().sum()

            loss().backward()
            moved = [name for name, value in policy.parameters.items() if value.grad is not None]
            assert moved == list(policy.parameters)
            checked = [
                name for name in moved if "to_q.lora_A" in name or "norm1.linear" in name or "attn1.to_v" in name
            ]
            assert len(checked) >= 4
            for name in checked:
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

    def test_a_reference_between_prediction_and_backward_costs_no_gradient(self, backends):
        backend = backends["pixels"]
        found = []
        for asks in (False, True):
            with DiTPolicy.opened(backend, full(backend), CLASSES, job()) as policy, policy.in_use():
                latents = noise(policy)
                loss = policy.predict(latents, TIMES, LABELS, 2.0).square().sum()
                if asks:
                    policy.reference(latents, TIMES, LABELS, 2.0)
                    backend.sample(full(backend), ROWS, GUIDED)
                loss.backward()
                found.append({name: value.grad for name, value in policy.parameters.items()})
        assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
        assert any(value.abs().max() > 0 for value in found[0].values())

    @pytest.mark.parametrize("parameters", ["lora", "full"])
    def test_what_is_trained_is_float32_on_a_backend_of_half_precision(self, folders, parameters):
        backend = open_backend(folders["pixels"], dtype="bfloat16")
        with DiTPolicy.opened(backend, full(backend), CLASSES, job(parameters)) as policy, policy.in_use():
            assert {value.dtype for value in policy.parameters.values()} == {torch.float32}
            latents = noise(policy)
            got = policy.predict(latents, TIMES, LABELS, 1.0)
            assert got.dtype == torch.float32
            assert torch.equal(got, policy.reference(latents, TIMES, LABELS, 1.0))
            got.sum().backward()
            gradients = [value.grad for value in policy.parameters.values()]
            assert all(value.dtype == torch.float32 and value.isfinite().all() for value in gradients)
            assert {value.dtype for value in policy.space.transformer.parameters()} <= {torch.bfloat16, torch.float32}


class TestTheBackendBetween:
    @pytest.mark.parametrize("parameters", ["lora", "full"])
    def test_serves_others_as_before_while_it_is_open(self, folders, parameters):
        backend = open_backend(folders["latents"])
        before = backend.sample(full(backend), ROWS, GUIDED)
        with DiTPolicy.opened(backend, full(backend), CLASSES, job(parameters)) as policy:
            shaken(policy, size=0.5)
            for _ in range(2):
                with policy.in_use():
                    tuned = policy.predict(noise(policy), TIMES, LABELS, 2.0)
                assert torch.equal(backend.sample(full(backend), ROWS, GUIDED), before)
                with policy.in_use():
                    assert torch.equal(policy.predict(noise(policy), TIMES, LABELS, 2.0), tuned)
                    assert torch.equal(backend.sample(full(backend), ROWS, GUIDED), before)
                    assert torch.equal(policy.predict(noise(policy), TIMES, LABELS, 2.0), tuned)

    @pytest.mark.parametrize("parameters", ["lora", "full"])
    @pytest.mark.parametrize("end", ["whole", "failed", "failed in use"])
    def test_the_model_is_as_it_was(self, folders, parameters, end):
        backend = open_backend(folders["pixels"])
        model = backend.checkpoint(full(backend)).transformer
        before = snapshot(model)
        with ExitStack() as stack:
            if end != "whole":
                stack.enter_context(pytest.raises(ZeroDivisionError))
            policy = stack.enter_context(DiTPolicy.opened(backend, full(backend), CLASSES, job(parameters)))
            shaken(policy)
            with policy.in_use():
                policy.predict(noise(policy), TIMES, LABELS, 2.0).sum().backward()
                if end == "failed in use":
                    raise ZeroDivisionError
            if end == "failed":
                raise ZeroDivisionError
        assert same(snapshot(model), before)

    def test_a_lora_that_cannot_be_added_is_not_half_there(self, folders, monkeypatch):
        backend = open_backend(folders["pixels"])
        model = backend.checkpoint(full(backend)).transformer
        before = snapshot(model)
        monkeypatch.setattr(LoraWeights, "__init__", lambda self, *given: 1 / 0)
        with (
            pytest.raises(ZeroDivisionError),
            DiTPolicy.opened(backend, full(backend), CLASSES, job()),
        ):
            pass
        assert same(snapshot(model), before)

    def test_a_lora_that_comes_and_goes_meanwhile_changes_no_full_prediction(self, folders, tmp_path):
        """It renames the parameters of the layers that it is around."""
        backend = open_backend(folders["pixels"])
        with DiTPolicy.opened(backend, full(backend), CLASSES, job("full")) as policy:
            shaken(policy)
            with policy.in_use():
                expected = policy.predict(noise(policy), TIMES, LABELS, 2.0)
            with DiTPolicy.opened(backend, full(backend), CLASSES, job()) as other:
                shaken(other, size=1.0)
                with policy.in_use():
                    assert torch.equal(policy.predict(noise(policy), TIMES, LABELS, 2.0), expected)
            with policy.in_use():
                assert torch.equal(policy.predict(noise(policy), TIMES, LABELS, 2.0), expected)


class TestState:
    @pytest.mark.parametrize("parameters", ["lora", "full"])
    def test_comes_back_to_the_bit_in_another_process(self, folders, parameters):
        backend, other = open_backend(folders["pixels"]), open_backend(folders["pixels"])
        with DiTPolicy.opened(backend, full(backend), CLASSES, job(parameters)) as policy:
            shaken(policy)
            state = policy.state()
            with policy.in_use():
                expected = policy.predict(noise(policy), TIMES, LABELS, 2.0)
            shaken(policy, seed=2)
            assert not any(value is state[name] for name, value in policy.parameters.items())
        with (
            DiTPolicy.opened(other, full(other), CLASSES, replace_seed(job(parameters))) as second,
            second.in_use(),
        ):
            assert list(second.parameters) == list(state)
            second.restore(state)
            assert all(torch.equal(value, state[name]) for name, value in second.state().items())
            assert torch.equal(second.predict(noise(second), TIMES, LABELS, 2.0), expected)

    def test_a_seed_gives_the_same_first_lora(self, backends):
        backend, states = backends["pixels"], []
        for wanted in (job(), job(), replace_seed(job())):
            before = torch.get_rng_state()
            with DiTPolicy.opened(backend, full(backend), CLASSES, wanted) as policy:
                states.append(policy.state())
            assert torch.equal(torch.get_rng_state(), before)
        first, again, other = states
        drawn = [name for name in first if "lora_A" in name]
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not any(torch.equal(first[name], other[name]) for name in drawn)


def replace_seed(wanted: TuneJob) -> TuneJob:
    return wanted.model_copy(update={"seed": 99})


class TestWhatIsTrained:
    def test_the_projections_of_attention_and_of_the_condition(self, backends):
        backend = backends["pixels"]
        with DiTPolicy.opened(backend, full(backend), CLASSES, job(rank=5)) as policy:
            layers = {name.split(".lora_")[0].split(".", 2)[2] for name in policy.parameters}
            assert layers == {"attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "norm1.linear"}
            assert len(policy.parameters) == 2 * 2 * 5
            assert {min(value.shape) for value in policy.parameters.values()} == {5}

    def test_all_parameters_with_the_class_tables_of_the_base(self, backends, tmp_path):
        backend = backends["pixels"]
        base = cold_started(backend, tmp_path)
        tables = backend.resident(base).tables
        with DiTPolicy.opened(backend, base, ("x", "y"), job("full")) as policy:
            assert isinstance(policy._trained, FullWeights)
            assert policy.parameters.keys() == dict(policy.space.transformer.named_parameters()).keys()
            assert all(torch.equal(policy.parameters[name], table) for name, table in tables.items())


class TestRefusals:
    @pytest.mark.parametrize("classes", [("alpha", "beta"), ("alpha", "gamma", "beta"), ("a", "b", "c")])
    @pytest.mark.parametrize("parameters", ["lora", "full"])
    def test_other_classes_are_to_be_cold_started_first(self, backends, classes, parameters):
        backend = backends["pixels"]
        with (
            pytest.raises(InvalidRequest, match="cold start first") as error,
            DiTPolicy.opened(backend, full(backend), classes, job(parameters)),
        ):
            pass
        assert error.value.param == "base"

    def test_tables_of_another_checkpoint(self, backends, tmp_path):
        backend = backends["pixels"]
        base = cold_started(backend, tmp_path, "foreign")
        foreign = replace(base, base=replace(full(backend), ref=full(backend, name="elsewhere").ref))
        with (
            pytest.raises(WeightsCorrupt, match="was not learnt on"),
            DiTPolicy.opened(backend, foreign, ("x", "y"), job()),
        ):
            pass
