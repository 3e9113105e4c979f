"""The reverse step of a diffusion model as a random draw, and the log-density of what was drawn (RL-identity 3.2): the
one place where sampling for tuning, and the replay of it, get their numbers from.

Pure functions of tensors; results have the type of the latents, coefficients of the schedule are computed in float64.
Knows nothing of models, of samplers' lists of times, or of rewards.

    B rows, T times of the schedule, C channels of the latents, h w their height and width
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

SMALLEST_VARIANCE = 1e-20  # of a learned one, before its logarithm is taken


@dataclass(frozen=True)
class Schedule:
    """How much of the clean image is left at each time, and what the model says of it."""

    alphas: Tensor  # [T], cumulative products, falling
    final_alpha: float  # of DDIM after its last step: 1, or alphas[0]
    prediction: Literal["epsilon", "sample", "v_prediction"]
    clip: float | None  # models of pixels: the clean estimate stays in [-clip, clip], and the noise follows from it


class Transition(NamedTuple):
    """p(latents at `previous` | latents at `times`): a Gaussian, independent in every value."""

    mean: Tensor  # [B, C, h, w]
    std: Tensor  # [B, 1, 1, 1] (DDIM) or [B, C, h, w] (learned); 0: the row has no density


def ddim_transition(
    schedule: Schedule, output: Tensor, latents: Tensor, times: Tensor, previous: Tensor, eta: float
) -> Transition:
    """A step of DDIM (Song et al. 2021, eqs. 12 and 16), as random as eta says.

    Its std is 0 for eta 0, and where `previous` has as large an alpha as `times`, or an alpha of 1: there the step is
    a plain function, without a density. See `stochastic`.

    Args:
        output: [B, C, h, w], what the model said; of [B, 2C, h, w] the second half is left unread.
        latents: [B, C, h, w] at `times`. times: int64 [B]. previous: int64 [B], where the step leads; -1 is the end,
            at `final_alpha`. eta: 0 deterministic, 1 as random as DDPM.
    """
    alpha, before = _alphas(schedule, times), _alphas(schedule, previous)
    std = eta * ((1 - before) / (1 - alpha) * (1 - alpha / before)).clamp(min=0).sqrt()
    towards = (1 - before - std.square()).clamp(min=0).sqrt()
    clean, noise = _clean_and_noise(schedule, output, latents, alpha)
    mean = before.sqrt().to(latents) * clean + towards.to(latents) * noise
    return Transition(mean, std.to(latents))


def learned_transition(
    schedule: Schedule, output: Tensor, latents: Tensor, times: Tensor, previous: Tensor
) -> Transition:
    """A step of DDPM with the variance that the model itself says (Nichol & Dhariwal 2021, eq. 15), respaced.

    The log-variance lies between the posterior's (output -1) and that of the forward step (output 1). The step to the
    end leads to the clean image, whatever `final_alpha`, and is deterministic: its std is 0. See `stochastic`.

    Args:
        output: [B, 2C, h, w]: prediction and variance. Others as in `ddim_transition`.
    """
    assert output.shape[1] == 2 * latents.shape[1], "the model says no variance"
    alpha, before = _alphas(schedule, times), _alphas(schedule, previous)
    ends = (previous < 0)[:, None, None, None]
    before = torch.where(ends, 1.0, before)
    kept = alpha / before
    clean, _ = _clean_and_noise(schedule, output, latents, alpha)
    of_clean = before.sqrt() * (1 - kept) / (1 - alpha)
    of_latents = kept.sqrt() * (1 - before) / (1 - alpha)
    mean = of_clean.to(latents) * clean + of_latents.to(latents) * latents

    smallest = ((1 - before) / (1 - alpha) * (1 - kept)).clamp(min=SMALLEST_VARIANCE).log().to(latents)
    largest = (1 - kept).clamp(min=SMALLEST_VARIANCE).log().to(latents)
    part = (output[:, latents.shape[1] :].to(latents) + 1) / 2
    std = (0.5 * (part * largest + (1 - part) * smallest)).exp()
    return Transition(mean, torch.where(ends, 0.0, std))


def stochastic(transition: Transition) -> Tensor:
    """Which rows have a density, bool [B]. Only those can be learnt from: leave the others out of `log_prob`."""
    return (transition.std > 0).flatten(1).all(1)


def log_prob(transition: Transition, latents_before: Tensor) -> Tensor:
    """Log-density of the latents that were drawn, averaged over their C h w values: [B].

    The policy gradient of eq. 1 has the sum, which is C h w times as much: averaged, ratios of long and of short
    latents are alike. On equal inputs the result is equal to the bit.

    Args:
        transition: of `stochastic` rows only; of others it is NaN. That is not asserted, which would wait for the
            device at every step.
        latents_before: [B, C, h, w], at `previous`: the step after in sampling, the time before in diffusion.
    """
    mean, std = transition
    density = -0.5 * ((latents_before - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)
    return density.flatten(1).mean(1)


def _alphas(schedule: Schedule, times: Tensor) -> Tensor:
    """float64 [B, 1, 1, 1]."""
    found = schedule.alphas.to(times.device, torch.float64)[times.clamp(min=0)]
    return torch.where(times < 0, schedule.final_alpha, found)[:, None, None, None]


def _clean_and_noise(schedule: Schedule, output: Tensor, latents: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """The parts that the model takes the latents for, [B, C, h, w] each: latents = signal * clean + spread * noise."""
    said = output[:, : latents.shape[1]].to(latents)
    signal, spread = alpha.sqrt().to(latents), (1 - alpha).sqrt().to(latents)
    if schedule.prediction == "epsilon":
        clean, noise = (latents - spread * said) / signal, said
    elif schedule.prediction == "sample":
        clean, noise = said, (latents - signal * said) / spread
    else:
        clean, noise = signal * latents - spread * said, signal * said + spread * latents
    if schedule.clip is not None:
        clean = clean.clamp(-schedule.clip, schedule.clip)
        noise = (latents - signal * clean) / spread
    return clean, noise
