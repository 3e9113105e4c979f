import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from generator_service.rl.dpok import distance, surrogate
from generator_service.rl.logprob import Schedule, ddim_transition, log_prob


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---------------------------------------------------------------- the surrogate


def test_the_surrogate_by_hand():
    """clip 0.1, and ratios 0.8, 1.2, 1.05 for a good and a bad sample each."""
    ratio = doubles(0.8, 1.2, 1.05, 0.8, 1.2, 1.05)
    advantage = doubles(2, 2, 2, -2, -2, -2)
    loss, told, clipped = surrogate(ratio.log(), torch.zeros(6).double(), advantage, 0.1)
    wanted = doubles(-2 * 0.8, -2 * 1.1, -2 * 1.05, 2 * 0.9, 2 * 1.2, 2 * 1.05)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(told, ratio, rtol=1e-12, atol=0)
    assert clipped.tolist() == [False, True, False, True, False, False]


def test_rows_that_the_clip_holds_have_no_gradient_and_others_have_the_whole():
    now = doubles(-0.2, 0.2, 0.04, -0.2, 0.2, 0.04).requires_grad_()
    advantage = doubles(2, 2, 2, -2, -2, -2)
    loss, ratio, clipped = surrogate(now, torch.zeros(6).double(), advantage, 0.1)
    (gradient,) = torch.autograd.grad(loss.sum(), now)
    torch.testing.assert_close(gradient, torch.where(clipped, 0.0, -advantage * ratio), rtol=1e-12, atol=0)
    assert clipped.tolist() == [False, True, False, True, False, False]


def test_the_surrogate_s_gradient_is_that_of_its_values():
    now, old = doubles(-0.3, 0.2, 0.01, -0.02, 0.3).requires_grad_(), doubles(0, 0, 0, 0, 0)
    assert torch.autograd.gradcheck(lambda x: surrogate(x, old, doubles(1, -1, 2, -3, 0), 0.05).loss, now)


@pytest.mark.parametrize("clip", [1e-4, 0.2])
def test_at_ratio_1_it_is_the_plain_policy_gradient(clip):
    """In float32 too, where a clip of 1e-4 is a thousand of its steps; nothing is clipped."""
    now = torch.randn(64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    advantage = torch.randn(64, generator=torch.Generator().manual_seed(1))
    loss, ratio, clipped = surrogate(now, now.detach(), advantage, clip)
    (gradient,) = torch.autograd.grad(loss.sum(), now)
    assert torch.equal(gradient, -advantage) and torch.equal(ratio, torch.ones(64)) and not clipped.any()
    assert torch.equal(loss, -advantage)


def test_neither_the_old_weights_nor_the_baseline_get_gradients():
    now, old, advantage = (torch.randn(3).requires_grad_() for _ in range(3))
    loss, ratio, clipped = surrogate(now, old, advantage, 0.2)
    assert torch.autograd.grad(loss.sum(), [old, advantage], allow_unused=True, retain_graph=True) == (None, None)
    assert not ratio.requires_grad and not clipped.requires_grad


# ---------------------------------------------------------------- the distance


def test_the_distance_by_hand():
    output = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]], [[[0.0, 0.0]], [[0.0, 0.0]]]])
    reference = torch.tensor([[[[0.0, 2.0]], [[1.0, 1.0]]], [[[0.0, 0.0]], [[0.0, 0.0]]]])
    assert distance(output, reference).tolist() == [(1 + 0 + 4 + 9) / 4, 0.0]
    assert distance(output, reference, channels=1).tolist() == [(1 + 0) / 2, 0.0]


def test_the_distance_s_gradient():
    """That of its values, for the tuned side and the channels that count; none for the frozen side."""
    output, reference = (torch.randn(3, 4, 2, 2, dtype=torch.float64).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(lambda o: distance(o, reference.detach(), 2), output)
    tuned, frozen = torch.autograd.grad(distance(output, reference, 2).sum(), [output, reference], allow_unused=True)
    assert frozen is None and tuned[:, :2].abs().min() > 0 and tuned[:, 2:].abs().max() == 0


# ---------------------------------------------------------------- the policy gradient through a whole chain

VALUES = 4  # of a sample: 1 channel, 2 x 2
WEIGHTS = doubles(0.9, -0.6, 0.4, 0.7).reshape(1, 1, 2, 2)


class Predictor(torch.nn.Module):
    """A noise predictor with a few parameters: two units, tied on both sides, and a bias that depends on the time."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(doubles(0.5, -0.3, 0.4, 0.2, -0.2, 0.6, 0.3, 0.5).reshape(2, VALUES))
        self.bias = torch.nn.Parameter(doubles(0.2, -0.1, 0.3, 0.1))  # of each time

    def forward(self, latents: Tensor, times: Tensor) -> Tensor:
        noise = torch.tanh(latents.flatten(1) @ self.weight.T) @ self.weight + self.bias[times][:, None]
        return noise.reshape(latents.shape)


def reward(sample: Tensor) -> Tensor:
    """Smooth, bounded: [B]."""
    return torch.tanh((WEIGHTS * sample).sum((1, 2, 3)) + 0.3 * sample.square().mean((1, 2, 3)))


@dataclass(frozen=True)
class Chain:
    """Four steps of DDIM with eta 1 of the predictor. With a final alpha of 1 the last of them is deterministic."""

    final_alpha: float

    def steps(self) -> list[tuple[int, bool]]:
        return [(time, time > 0 or self.final_alpha < 1) for time in (3, 2, 1, 0)]

    def transition(self, predictor, weights: dict[str, Tensor], latents: Tensor, time: int):
        schedule = Schedule(doubles(0.9, 0.65, 0.3, 0.05), self.final_alpha, "epsilon", None)
        times = torch.full((len(latents),), time)
        output = functional_call(predictor, weights, (latents, times))
        return ddim_transition(schedule, output, latents, times, times - 1, 1.0)

    def rewards(self, predictor, weights: dict[str, Tensor], noise: Tensor) -> Tensor:
        """Of noise [5, B, 1, 2, 2], with nothing but it at random: [B]."""
        latents = noise[0]
        for (time, _), drawn in zip(self.steps(), noise[1:], strict=True):
            mean, std = self.transition(predictor, weights, latents, time)
            latents = mean + std * drawn
        return reward(latents)


def flat(gradients) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients])


def score_function(chain: Chain, predictor: Predictor, noise: Tensor) -> Tensor:
    """The estimate of one batch of rollouts as tuning makes it: minus the gradient of the surrogate, from stored
    latents; times the number of values, since log_prob is their average. A last step without a density adds the plain
    derivative of the reward: the chain's rest is the random part, and the reward depends on the weights itself."""
    weights = dict(predictor.named_parameters())
    latents, stored = noise[0], []
    with torch.no_grad():
        for (time, random), drawn in zip(chain.steps(), noise[1:], strict=True):
            transition = chain.transition(predictor, weights, latents, time)
            after = transition.mean + transition.std * drawn
            stored.append((latents, time, random, after, log_prob(transition, after) if random else None))
            latents = after
    rewards = reward(latents)
    advantage = rewards - rewards.mean()  # of B rows this takes 1 / B of the gradient away
    loss = torch.zeros(())
    for before, time, random, after, old in stored:
        transition = chain.transition(predictor, weights, before, time)
        if random:
            loss = loss + VALUES * surrogate(log_prob(transition, after), old, advantage, 1e-4).loss.mean()
        else:
            loss = loss - reward(transition.mean).mean()
    return -flat(torch.autograd.grad(loss, list(predictor.parameters())))


def finite_differences(chain: Chain, predictor: Predictor, noise: Tensor, step: float = 1e-4) -> Tensor:
    """Central differences of the mean reward in each weight, through the whole chain, on the same noise."""
    weights = {name: value.detach().clone() for name, value in predictor.named_parameters()}
    slopes = []
    with torch.no_grad():
        for value in weights.values():
            for at in range(value.numel()):
                middle = value.view(-1)[at].item()
                means = []
                for moved in (middle + step, middle - step):
                    value.view(-1)[at] = moved
                    means.append(chain.rewards(predictor, weights, noise).mean())
                value.view(-1)[at] = middle
                slopes.append((means[0] - means[1]) / (2 * step))
    return torch.stack(slopes)


def mean_and_error(batches: Tensor) -> tuple[Tensor, Tensor]:
    """Of estimates [batches, ...]: their mean, and its standard error."""
    return batches.mean(0), batches.std(0) / math.sqrt(len(batches))


@pytest.mark.parametrize("final_alpha", [0.97, 1.0])
def test_the_policy_gradient_is_that_of_the_expected_reward(final_alpha):
    """The estimator's mean agrees with finite differences through the whole chain: in each weight, and along the
    gradient within less than 5 %, at four standard errors; an estimator that is off by a tenth would not."""
    chain, predictor, generator = Chain(final_alpha), Predictor(), torch.Generator().manual_seed(1)

    def noise(rows: int) -> Tensor:
        return torch.randn(5, rows, 1, 2, 2, generator=generator, dtype=torch.float64)

    estimates = torch.stack([score_function(chain, predictor, noise(8000)) for _ in range(60)])
    halves = [noise(3000) for _ in range(16)]  # each with its mirror image, which takes out what is odd in the noise
    slopes = torch.stack([finite_differences(chain, predictor, torch.cat([half, -half], 1)) for half in halves])

    (estimate, error), (truth, its_error) = mean_and_error(estimates), mean_and_error(slopes)
    assert ((estimate - truth) / (error.square() + its_error.square()).sqrt()).abs().max() < 4
    along = truth / truth.square().sum()
    (part, part_error), (_, true_error) = mean_and_error(estimates @ along), mean_and_error(slopes @ along)
    interval = 4 * float(part_error.square() + true_error.square()) ** 0.5
    assert interval < 0.05
    assert abs(part - 1) < interval
    for wrong in (0.9, 1.1):
        assert abs(wrong * part - 1) > interval
