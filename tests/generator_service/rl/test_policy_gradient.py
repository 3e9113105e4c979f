"""The gradient that is learnt from, against finite differences of the expected reward through the whole sampling chain.

The schedule is one where every step but the last is random, and the last is the identity, so that nothing of what the
parameters do is left out of learning. The reward is a smooth function of the decoded sample.
"""

from __future__ import annotations

import math

import pytest
import torch

from generator_service.rl.trajectories import Ring
from generator_service.rl.update import Sums
from tests.generator_service.rl.tiny_policy import Tiny, checkpoint, job, opened, run

STEPS, ROWS = 4, 240
SCHEDULE = {"num_train_timesteps": STEPS, "steps_offset": 0, "beta_start": 0.3, "beta_end": 0.6, "clip_sample": False}
FIRST = 24  # rollouts that the direction is taken from
NUDGE = 1e-2  # of the parameters, along a direction of length 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("dit"), **SCHEDULE)


class Estimates:
    def __init__(self, tiny: Tiny):
        self.tiny, self.parameters = tiny, list(tiny.policy.parameters.values())

    def rollout(self, seed: int):
        wanted = self.tiny.wanted(seed)
        ring = Ring(1, ROWS, STEPS, (1, 8, 8), torch.device("cpu"), offload=False)
        made = self.tiny.sampled(ring, wanted)
        (last,) = ring.read(0, made.batches[0], [STEPS - 1])
        pictures = self.tiny.policy.space.decode(last.after)[:, 0]
        return ring, made, 8 * torch.sin(1.5 * pictures).mean((1, 2))

    def gradient(self, seed: int, baseline: float) -> torch.Tensor:
        """Of the expected reward, one rollout's estimate. The loss averages over steps and over values of a latent."""
        ring, made, rewards = self.rollout(seed)
        pairs = [(0, step) for step in self.tiny.process.learnt]
        pieces = self.tiny.learner.accumulate(made, ring, pairs, lambda p: (rewards - baseline)[p.rows], Sums())
        run(pieces)
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        return -len(pairs) * 64 * torch.cat([grad.flatten() for grad in found])

    @torch.no_grad()
    def reward_along(self, direction: torch.Tensor, by: float, seed: int) -> float:
        own = [parameter.clone() for parameter in self.parameters]
        parts = direction.split([parameter.numel() for parameter in own])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter += by * part.view_as(parameter)
        mean = self.rollout(seed)[2].mean().item()
        for parameter, before in zip(self.parameters, own, strict=True):
            parameter.copy_(before)
        return mean


def mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    return values.mean().item(), values.std().item() / math.sqrt(len(values))


@pytest.mark.parametrize(
    ("options", "rollouts"), [({"parameters": "full"}, 20), ({"parameters": "lora", "keep": "recompute"}, 56)]
)
def test_the_estimators_mean_is_the_slope_of_the_expected_reward(folder, options, rollouts):
    """Within its confidence interval, which is narrow enough that an error of 15 % would show."""
    samples = {"identities": 3, "samples": ROWS // 3, "batch_size": ROWS, "denoising_steps": STEPS}
    wanted = job(rollout=samples, update={"batch_size": ROWS, "kl": 0.0}, policy=options)
    with opened(folder, wanted) as tiny:
        estimates = Estimates(tiny)
        assert tiny.process.learnt == [0, 1, 2]
        baseline = estimates.rollout(999)[2].mean().item()
        direction = torch.stack([estimates.gradient(seed, baseline) for seed in range(FIRST)]).mean(0)
        direction /= direction.norm()
        along = [estimates.gradient(FIRST + seed, baseline) @ direction for seed in range(rollouts)]
        slopes = []
        for seed in range(1000, 1006):
            up, down = (estimates.reward_along(direction, sign * NUDGE, seed) for sign in (1, -1))
            slopes.append((up - down) / (2 * NUDGE))
    estimate, its_error = mean_and_error(torch.stack(along))
    slope, slope_error = mean_and_error(torch.tensor(slopes))
    error = math.hypot(its_error, slope_error)
    assert abs(estimate - slope) < 3 * error
    assert slope > 0 and 3 * error < 0.15 * slope  # so that neither 1.15 nor 0.85 times as much could pass by its mean
