"""The gradient of what is really minimised against that of the expected reward, where all actions can be enumerated;
and that it teaches: where the best action depends on the state, more than any fixed one is worth."""

from __future__ import annotations

import math
from copy import deepcopy

import numpy as np
import pytest
import torch

from generator_service.rl.clip_rewards import relative
from generator_service.rl.reinforce import Learner, compared, surrogate
from generator_service.rl.sampling_policy import SamplingPolicy
from protocol.errors import TrainingDiverged
from protocol.policy import ActionSpace
from tests.generator_service.rl.test_sampling_policy import policy, sizes, states

SPACE = ActionSpace(steps=[5, 10], pairs=[(2.0, 2.0), (3.0, 2.0), (2.0, 3.0)])
FACTORISED = SPACE.model_copy(update={"factorised": True})


def rewards_of(count: int, space: ActionSpace, seed: int = 3) -> torch.Tensor:
    """Of every action of each state, some of them below 0."""
    return torch.randn(count, len(policy(space).actions), generator=torch.Generator().manual_seed(seed)).double()


def expected(made: SamplingPolicy, latents, text, rewards) -> torch.Tensor:
    """Eq. 19, exactly: over all actions, and the states' mean."""
    return (made(latents, text).exp() * rewards).sum(1).mean()


def gradient(made: SamplingPolicy, loss: torch.Tensor) -> torch.Tensor:
    made.zero_grad()
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in made.parameters()])


def enumerated(made: SamplingPolicy, latents, text, rewards) -> torch.Tensor:
    """What is minimised, of every action as often as the policy draws it."""
    count = rewards.shape[1]
    every = torch.arange(count).expand(len(latents), count)
    log_prob = made.log_prob(latents, text, every)
    return surrogate(log_prob, rewards * count * log_prob.exp())


@pytest.mark.parametrize("space", [SPACE, FACTORISED])
def test_it_is_the_gradient_of_the_expected_reward(space):
    """Against central differences of eq. 19, in double precision, along every direction of a sample of parameters."""
    made = policy(space, spread=0.5).double()
    latents, text = (part.double() for part in states(2))
    rewards = rewards_of(2, space)
    found = -gradient(made, enumerated(made, latents, text, rewards))
    flat = torch.nn.utils.parameters_to_vector(made.parameters()).detach()
    directions = torch.linspace(0, len(flat) - 1, 60).long().tolist()
    directions += [int(index) for index in found.abs().topk(20).indices]
    for index in directions:
        step = torch.zeros_like(flat)
        step[index] = 1e-5
        ends = []
        for sign in (1, -1):
            torch.nn.utils.vector_to_parameters(flat + sign * step, made.parameters())
            with torch.no_grad():
                ends.append(float(expected(made, latents, text, rewards)))
        torch.nn.utils.vector_to_parameters(flat, made.parameters())
        assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(float(found[index]), rel=1e-5, abs=1e-9)
    assert found.abs().max() > 1e-3


def test_drawn_actions_estimate_it_without_bias():
    """Eqs. 20 and 21: the mean over many draws comes near the exact gradient, in units of its own standard error."""
    made, (latents, text) = policy(SPACE, spread=0.5), states(2)
    rewards = rewards_of(2, SPACE).float()
    exact = -gradient(made, -expected(made, latents, text, rewards))
    rng, found = torch.Generator().manual_seed(0), []
    for _ in range(150):
        chosen = made.sample(latents, text, 64, rng)
        found.append(gradient(made, surrogate(made.log_prob(latents, text, chosen), rewards.gather(1, chosen))))
    estimates = -torch.stack(found)
    error = estimates.std(0) / math.sqrt(len(found))
    alive = error > 1e-8
    far = (estimates.mean(0) - exact)[alive] / error[alive]
    assert far.square().mean() < 2 and torch.cosine_similarity(estimates.mean(0), exact, dim=0) > 0.95


def test_an_update_makes_what_paid_likelier_and_what_cost_less_likely():
    torch.manual_seed(0)
    made, (latents, text) = SamplingPolicy(sizes(SPACE)), states(1)
    learner = Learner(made, 1e-2)
    loss = learner.learn(latents, text, torch.tensor([[0, 4]]), torch.tensor([[2.0, -1.0]], dtype=torch.float64))
    assert loss == pytest.approx((2.0 - 1.0) / 2 * math.log(6))
    after = made(latents, text)[0].exp()
    assert after[0] > 1 / 6 > after[4]


def test_what_is_not_finite_ends_it_and_changes_nothing():
    torch.manual_seed(0)
    made, (latents, text) = SamplingPolicy(sizes(SPACE)), states(1)
    before = made(latents, text)
    with pytest.raises(TrainingDiverged, match="learning_rate"):
        Learner(made, 1e-2).learn(latents, text, torch.tensor([[0]]), torch.tensor([[math.nan]]))
    assert torch.equal(made(latents, text), before)


def test_it_goes_on_from_its_state_as_if_nothing_had_been():
    def learn(learner: Learner, *updates: int) -> None:
        for index in updates:
            chosen = torch.tensor([[index % 6, (index + 1) % 6]] * 2)
            learner.learn(*states(2), chosen, torch.tensor([[1.0, -1.0]] * 2))

    straight, other = policy(SPACE), policy(SPACE, seed=9)
    first, second = Learner(straight, 1e-3), Learner(other, 1e-3)
    learn(first, 0, 1, 2)
    second.restore(deepcopy(first.state()))
    learn(first, 3, 4)
    learn(second, 3, 4)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), other.parameters(), strict=True))


# ---------------------------------------------------------------- it teaches


def environment(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """States, and what every action is worth in each [count, A], from 3 to 8: the image says which steps are best, the
    text which of the first two pairs."""
    rng = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (2, count), generator=rng) * 2 - 1
    latents = 0.3 * torch.randn(count, 4, 8, 8, generator=rng) + 0.5 * signs[0, :, None, None, None]
    text = 0.3 * torch.randn(count, 5, 6, generator=rng) + signs[1, :, None, None] * torch.linspace(-1, 1, 6)
    worth = np.full((count, len(SPACE.steps), len(SPACE.pairs)), 4.0) - np.array([0.0, 0.0, 1.0])
    rows = np.arange(count)
    worth[rows, (signs[0] > 0).long().numpy()] += 2
    worth[rows, :, (signs[1] > 0).long().numpy()] += 2
    return latents, text, worth.reshape(count, -1)


def test_with_a_baseline_what_is_alike_teaches_nothing_and_worse_ones_are_unlearnt():
    rewards = torch.tensor([[4.0, 2.0, -1.0, -1.0], [3.0, 3.0, 3.0, 3.0]])
    assert compared(rewards, "state").tolist() == [[3.0, 1.0, -2.0, -2.0], [0.0] * 4]
    assert compared(rewards, "none") is rewards


@pytest.mark.parametrize("baseline", ["none", "state"])
def test_where_the_best_action_depends_on_the_state_it_learns_more_than_any_fixed_one_is_worth(baseline):
    """Four kinds of states, each with a best action of its own; measured on states that it never saw."""
    torch.manual_seed(0)
    made = SamplingPolicy(sizes(SPACE))
    learner, rng = Learner(made, 3e-3), torch.Generator().manual_seed(0)
    latents, text, rewards = environment(256, seed=1)
    curve = []
    for _ in range(150):
        rows = torch.randint(0, 256, (16,), generator=rng)
        chosen = made.sample(latents[rows], text[rows], 4, rng)
        got = np.take_along_axis(rewards[rows.numpy()], chosen.numpy(), axis=1)
        learnt = compared(torch.from_numpy(relative(got, 2, 1.0)), baseline)
        learner.learn(latents[rows], text[rows], chosen, learnt)
        curve.append(got.mean())
    *held_out, table = environment(128, seed=2)
    learned = table[np.arange(128), made.likeliest(*held_out).numpy()].mean()
    random, fixed, oracle = table.mean(), table.mean(0).max(), table.max(1).mean()
    assert random < fixed < oracle == 8.0
    assert learned > fixed + 0.8 * (oracle - fixed), (random, fixed, learned, oracle)
    assert np.mean(curve[-30:]) > np.mean(curve[:30]) + 1
