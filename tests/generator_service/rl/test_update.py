from __future__ import annotations

import math

import pytest
import torch

from generator_service.rl.trajectories import Replay
from generator_service.rl.update import Sums
from protocol.errors import TrainingDiverged
from tests.generator_service.rl.tiny_policy import brightness, checkpoint, job, opened, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("dit"))


def gradients(tiny) -> dict[str, torch.Tensor]:
    return {name: value.grad.clone() for name, value in tiny.policy.parameters.items() if value.grad is not None}


def accumulated(tiny, advantage=None) -> dict[str, torch.Tensor]:
    trajectories = tiny.trajectories()
    made = tiny.sampled(trajectories)
    pairs = [(number, step) for number in range(len(made.batches)) for step in tiny.process.learnt]
    sums = Sums()
    run(tiny.learner.accumulate(made, trajectories, pairs, advantage or brightness(made), sums))
    return gradients(tiny) | {"told": sums.told()}


def perturbed(tiny) -> None:
    """Weights that have gone some way from the frozen ones."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in tiny.policy.parameters.values():
            value.add_(0.05 * torch.randn(value.shape, generator=rng))


def test_the_gradient_is_that_of_the_loss_written_out(folder):
    """On fresh trajectories, with the Gaussian density and the squared distance computed here."""
    with opened(folder, job(update={"kl": 0.3}, rollout={"guidance_scale": 2.0})) as tiny:
        perturbed(tiny)
        made = tiny.sampled(ring := tiny.trajectories())
        found = accumulated(tiny)
        told, advantage = found.pop("told"), brightness(made)
        loss, distances, count = torch.zeros(()), [], 0
        for number, batch in enumerate(made.batches):
            for piece in ring.read(number, batch, range(3)):
                with tiny.policy.in_use():
                    output, (mean, std) = tiny.process.forward(piece.before, piece.labels, piece.steps)
                    reference = tiny.process.reference(piece.before, piece.labels, piece.steps)
                    density = torch.distributions.Normal(mean, std.expand_as(mean)).log_prob(piece.after)
                    distance = (output - reference).square().mean((1, 2, 3))
                    part = (-advantage(piece) * density.mean((1, 2, 3)) + 0.3 * distance).sum()
                    grads = torch.autograd.grad(part, list(tiny.policy.parameters.values()))
                loss = [a + b for a, b in zip(loss, grads, strict=True)] if count else list(grads)
                distances.append(distance.detach())
                count += len(piece)
        for name, grad in zip(tiny.policy.parameters, loss, strict=True):
            assert torch.allclose(found[name], grad / count, rtol=1e-4, atol=1e-7)
        assert told.kl == pytest.approx(torch.cat(distances).mean().item(), rel=1e-5) and told.kl > 1e-4
        assert told.ratio == told.ratio_max == 1 and told.clip_share == 0


def test_gradients_are_accumulated(folder):
    """The size of a piece changes nothing but the last bits."""
    found = []
    for size in (1, 3, 4, 8, 100):
        with opened(folder, job(update={"batch_size": size})) as tiny:
            perturbed(tiny)
            grads = accumulated(tiny)
            grads.pop("told")
            found.append(torch.cat([value.flatten() for value in grads.values()]))
    assert all((other - found[0]).norm() < 1e-4 * found[0].norm() for other in found[1:]) and found[0].norm() > 0


def test_one_step_is_one_step_of_adam(folder):
    with opened(folder, job(update={"max_gradient_norm": 0})) as tiny:
        before = tiny.policy.state()
        grads = accumulated(tiny)
        told = grads.pop("told")
        trajectories = tiny.trajectories()
        made = tiny.sampled(trajectories)
        learnt = run(tiny.learner.learn(made, trajectories, brightness(made), torch.Generator()))
        for name, value in tiny.policy.parameters.items():  # Adam's first step is the gradient's sign, nearly
            step = -1e-2 * grads[name] / (grads[name].abs() + 1e-8)
            assert torch.allclose(value.detach() - before[name], step, atol=1e-5)
        norm = torch.cat([grad.flatten() for grad in grads.values()]).norm().item()
        assert learnt.gradient_norm == pytest.approx(norm, rel=1e-3) and learnt.loss == pytest.approx(told.loss)


def norms_applied(folder, **update) -> list[float]:
    """Of the gradients of a fresh LoRA's first rollout, as the optimiser gets them."""
    with opened(folder, job(update={"optimizer_steps": 3, **update})) as tiny:
        norms = []

        def stepped(*_) -> None:
            found = [value.grad.flatten() for value in tiny.policy.parameters.values() if value.grad is not None]
            norms.append(torch.cat(found).norm().item())

        tiny.learner._optimizer.register_step_pre_hook(stepped)
        made = tiny.sampled(trajectories := tiny.trajectories())
        told = run(tiny.learner.learn(made, trajectories, brightness(made), torch.Generator().manual_seed(0)))
    assert len(norms) == 3 and told.gradient_norm >= max(norms) * (1 - 1e-5)
    return norms


def test_no_later_step_of_a_rollout_has_a_larger_gradient_than_its_first(folder):
    """Displaced weights make it many times as large, where the variance of a step is small."""
    free, held = norms_applied(folder, max_gradient_norm=0), norms_applied(folder)
    assert free[0] == held[0] and max(free) > 10 * free[0]
    assert max(held) <= held[0] * (1 + 1e-5)
    low = held[0] / 2
    assert norms_applied(folder, max_gradient_norm=low) == pytest.approx([low] * 3, rel=0.05)


def test_later_updates_of_a_rollout_have_other_ratios_and_are_clipped(folder):
    with opened(folder, job(update={"epochs": 4, "clip": 1e-4, "learning_rate": 1e-2})) as tiny:
        trajectories = tiny.trajectories()
        made = tiny.sampled(trajectories)
        learnt = run(tiny.learner.learn(made, trajectories, brightness(made), torch.Generator().manual_seed(0)))
    assert 0.2 < learnt.clip_share < 0.75 and learnt.ratio_max > 1.0001 and learnt.ratio != 1
    assert learnt.kl > 0


def test_the_reward_rises(tmp_path):
    """Brightness of the samples, over some rollouts of the whole thing."""
    checkpoint(tmp_path, num_train_timesteps=4, steps_offset=0, beta_start=0.3, beta_end=0.6, clip_sample=False)
    samples = {"identities": 3, "samples": 16, "batch_size": 48, "denoising_steps": 4}
    wanted = job(rollout=samples, update={"batch_size": 48, "learning_rate": 1e-2, "kl": 0.0, "clip": 0.1})
    with opened(tmp_path, wanted) as tiny:
        trajectories, rng = Replay(tiny.process), torch.Generator().manual_seed(0)
        seen = []
        for seed in range(30):
            made = tiny.sampled(trajectories, tiny.wanted(seed))
            seen.append(made.images.mean() / 255)
            run(tiny.learner.learn(made, trajectories, brightness(made), rng))
    assert sum(seen[-5:]) / 5 > sum(seen[:5]) / 5 + 0.1, seen


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_learns_nearly_the_same(folder, precision):
    found = []
    for wanted in (job(), job(update={"precision": precision})):
        with opened(folder, wanted) as tiny:
            trajectories = tiny.trajectories()
            made = tiny.sampled(trajectories)
            before = tiny.policy.state()
            learnt = run(tiny.learner.learn(made, trajectories, brightness(made), torch.Generator().manual_seed(0)))
            after = tiny.policy.state()
            assert all(value.dtype == torch.float32 for value in after.values()) and learnt.ratio == 1
            found.append(torch.cat([(after[name] - before[name]).flatten() for name in before]))
    moved = [step for step in found if step.abs().max() > 0]
    assert len(moved) == 2 and torch.cosine_similarity(*found, dim=0) > 0.7


def test_the_gradients_norm_is_limited(folder):
    with opened(folder, job(update={"max_gradient_norm": 1e-3})) as tiny:
        trajectories = tiny.trajectories()
        made = tiny.sampled(trajectories)
        norms = []
        real = tiny.learner._scaler.step

        def stepped(optimizer):
            norms.append(torch.cat([value.grad.flatten() for value in tiny.policy.parameters.values()]).norm().item())
            return real(optimizer)

        tiny.learner._scaler.step = stepped
        learnt = run(tiny.learner.learn(made, trajectories, brightness(made), torch.Generator()))
    assert norms == [pytest.approx(1e-3, rel=1e-2)] and learnt.gradient_norm > 2e-3


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_loss_that_is_not_finite_is_told_and_not_applied(folder, broken, precision):
    with opened(folder, job(update={"precision": precision})) as tiny:
        trajectories = tiny.trajectories()
        made = tiny.sampled(trajectories)
        before = tiny.policy.state()
        with pytest.raises(TrainingDiverged, match=r"lower update.learning_rate"):
            advantage = lambda piece: torch.full((len(piece),), broken)  # noqa: E731
            run(tiny.learner.learn(made, trajectories, advantage, torch.Generator()))
        assert all(value.equal(before[name]) for name, value in tiny.policy.state().items())


def test_float16_that_overflows_takes_a_smaller_scale_and_no_step(folder):
    """Gradients of one step are too large at the first scale: no error, nothing applied; later ones are."""
    with opened(folder, job(update={"precision": "float16"})) as tiny:
        trajectories, rng = tiny.trajectories(), torch.Generator().manual_seed(0)
        before, scale = tiny.policy.state(), tiny.learner._scaler.get_scale()
        steps = 0
        for _ in range(60):
            made = tiny.sampled(trajectories)
            advantage = brightness(made)
            run(tiny.learner.learn(made, trajectories, lambda piece, of=advantage: of(piece) * 3e4, rng))
            steps += 1
            if any(not value.equal(before[name]) for name, value in tiny.policy.state().items()):
                break
        assert steps > 1 and tiny.learner._scaler.get_scale() < scale


def test_a_learner_goes_on_where_its_state_was_taken(folder):
    def learnt(resumed: bool) -> dict[str, torch.Tensor]:
        with opened(folder) as tiny:
            state = None
            for seed in range(3):
                if resumed and seed == 2:
                    assert state is not None
                    tiny.policy.restore(state[0])
                    tiny.learner.restore(state[1])
                trajectories = tiny.trajectories()
                made = tiny.sampled(trajectories, tiny.wanted(seed))
                rng = torch.Generator().manual_seed(seed)
                run(tiny.learner.learn(made, trajectories, brightness(made), rng))
                if seed == 1:
                    learner = tiny.learner.state()
                    state = (tiny.policy.state(), {**learner, "optimizer": _copied(learner["optimizer"])})
                    if resumed:  # what came of it otherwise does not matter
                        perturbed(tiny)
                        tiny.learner.begin_anew(0.5)
            return tiny.policy.state()

    straight, resumed = learnt(False), learnt(True)
    assert all(straight[name].equal(resumed[name]) for name in straight)


def _copied(value):
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_copied(inner) for inner in value]
    return value.clone() if isinstance(value, torch.Tensor) else value
