"""A policy's reverse process: the steps of its own DDIM sampler, each a distribution over the next latents.

One place for sampling, replay and learning, so that all three compute the same. Knows nothing of rewards, of what is
stored, nor of how the policy learns.

    B rows, T denoising steps, C channels of the latents, h w their height and width
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from generator_service.rl import logprob
from generator_service.rl.logprob import Schedule, Transition
from generator_service.rl.policy import Policy
from protocol.errors import InvalidRequest
from protocol.tuning import RolloutOptions


class ReverseProcess:
    """Steps are numbered as they are taken: 0 from pure noise, T - 1 to the sample."""

    def __init__(self, policy: Policy, options: RolloutOptions, precision: str):
        """
        Args:
            precision: of the policy's passes; what it says, and all that is made of it, is float32.

        Raises InvalidRequest when the sampler cannot take so many steps, or the model says nothing of its variance.
        """
        learned = options.variance == "learned"
        if learned and not policy.learned_variance:
            raise InvalidRequest(
                'this model does not tell the variance of its steps: use variance = "ddim"', param="rollout.variance"
            )
        self.policy, self.options = policy, options
        self._dtype = getattr(torch, precision)
        self._variance_told = learned
        self.schedule, times = _schedule(policy, options.denoising_steps)
        self.noise_scale = 1.0  # of the first latents; DDIM's
        device = policy.space.device
        stride = self.trained_steps // options.denoising_steps
        self.times = torch.tensor(times, device=device)  # int64 [T]
        self.previous = torch.tensor([max(time - stride, -1) for time in times], device=device)  # -1: the end
        self.learnt = self._random_steps()

    @property
    def trained_steps(self) -> int:
        return len(self.schedule.alphas)

    def _random_steps(self) -> list[int]:
        """Steps with some variance: others are no choice of the policy's, and nothing is learnt of them."""
        steps = len(self.times)
        still = torch.zeros(steps, 1, 1, 1, device=self.times.device)
        output = torch.cat([still, still], dim=1) if self._variance_told else still
        random = logprob.stochastic(self._distribution(output, still, self.times, self.previous))
        return torch.nonzero(random).flatten().tolist()

    def forward(
        self, latents: torch.Tensor, labels: torch.Tensor, steps: torch.Tensor
    ) -> tuple[torch.Tensor, Transition]:
        """What the policy says, [B, C or 2C, h, w], and the distribution of the next latents. Within `policy.in_use`.

        Args:
            latents: float32 [B, C, h, w]. labels: int64 [B]. steps: int64 [B], numbers of steps.
        """
        times, previous = self.times[steps], self.previous[steps]
        with self._precision():
            output = self.policy.predict(latents, times, labels, self.options.guidance_scale)
        return output, self._distribution(output, latents, times, previous)

    def reference(self, latents: torch.Tensor, labels: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """What the frozen base says to the same, [B, C or 2C, h, w]."""
        with self._precision(), torch.no_grad():
            return self.policy.reference(latents, self.times[steps], labels, self.options.guidance_scale)

    def _distribution(
        self, output: torch.Tensor, latents: torch.Tensor, times: torch.Tensor, previous: torch.Tensor
    ) -> Transition:
        if self._variance_told:
            return logprob.learned_transition(self.schedule, output, latents, times, previous)
        return logprob.ddim_transition(self.schedule, output, latents, times, previous, self.options.eta)

    def _precision(self) -> torch.autocast:
        kind = self.policy.space.device.type
        return torch.autocast(kind, self._dtype, enabled=self._dtype != torch.float32)


def _schedule(policy: Policy, steps: int) -> tuple[Schedule, list[int]]:
    """The checkpoint's noise schedule, and the times [T] of its DDIM sampler, descending."""
    scheduler = policy.space.scheduler("ddim")
    config = scheduler.config
    trained = config.num_train_timesteps
    times: Sequence[int] = []
    if steps <= trained:
        scheduler.set_timesteps(steps)
        times = scheduler.timesteps.unique().flip(0).tolist()
    if len(times) != steps or times[0] >= trained:
        raise InvalidRequest(
            f"{steps} steps are too many for this sampler on a schedule of {trained}: ask for fewer",
            param="rollout.denoising_steps",
        )
    alphas = scheduler.alphas_cumprod.to(policy.space.device)
    clip = config.clip_sample_range if config.clip_sample else None
    return Schedule(alphas, float(scheduler.final_alpha_cumprod), config.prediction_type, clip), list(times)


class RowNoise:
    """The noise of a batch: each row has a generator of its own, so that it never depends on batch-mates."""

    def __init__(self, seeds: Sequence[int], shape: Sequence[int], device: torch.device):
        """`shape`: (C, h, w)."""
        self._sources = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._shape, self._device = tuple(shape), device

    def draw(self) -> torch.Tensor:
        """float32 [B, C, h, w]: at first the latents to begin with, then what each step adds."""
        rows = torch.stack([torch.randn(self._shape, generator=source) for source in self._sources])
        return rows.to(self._device)


def next_latents(transition: Transition, noise: torch.Tensor) -> torch.Tensor:
    """What a draw from the distribution leads to, [B, C, h, w], with standard normal noise of that shape."""
    return transition.mean + transition.std * noise
