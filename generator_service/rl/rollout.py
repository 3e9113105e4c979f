"""Samples to learn from: identities drawn, several images of each, and every step's log-probability (DPOK).

A row's noise comes from a generator of its own, so its sample never depends on batch-mates. Knows nothing of rewards.

    n rows of a rollout, B of one batch, T denoising steps, C channels of the latents, h w their height and width
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from generator_service.rl import logprob
from generator_service.rl.reverse_process import ReverseProcess, RowNoise, next_latents
from generator_service.rl.trajectories import SampledBatch, Trajectories


@dataclass(frozen=True)
class Rollout:
    batches: list[SampledBatch]
    images: np.ndarray  # uint8 [n, H, W, 3]
    labels: torch.Tensor  # int64 [n], on the CPU; rows of an identity follow one another


@dataclass(frozen=True)
class Wanted:
    """What a rollout is to show."""

    labels: torch.Tensor  # int64 [n]
    seeds: list[int]  # of each row


def draw(known: Sequence[int], identities: int, samples: int, rng: torch.Generator) -> Wanted:
    """Some of the known identities, each once, all where there are fewer; so many samples of each."""
    chosen = torch.tensor(known)[torch.randperm(len(known), generator=rng)[:identities]]
    labels = chosen.repeat_interleave(samples)
    seeds = torch.randint(2**63 - 1, (len(labels),), generator=rng)
    return Wanted(labels, seeds.tolist())


def sample(
    process: ReverseProcess, wanted: Wanted, batch_size: int, trajectories: Trajectories
) -> Generator[None, None, Rollout]:
    """Denoise them, `batch_size` at a time; yields after each denoising step, and returns the rollout."""
    batches, images = [], []
    for number, rows in enumerate(torch.arange(len(wanted.labels)).split(batch_size)):
        batch, made = yield from _batch(process, wanted, rows, number, trajectories)
        batches.append(batch)
        images.append(made)
    return Rollout(batches, np.concatenate(images), wanted.labels)


def _batch(
    process: ReverseProcess, wanted: Wanted, rows: torch.Tensor, number: int, trajectories: Trajectories
) -> Generator[None, None, tuple[SampledBatch, np.ndarray]]:
    policy = process.policy
    space = policy.space
    labels, seeds = wanted.labels[rows].to(space.device), [wanted.seeds[row] for row in rows.tolist()]
    noise = RowNoise(seeds, space.latent_shape, space.device)
    latents = noise.draw() * process.noise_scale
    log_probs = torch.zeros(len(process.times), len(rows), device=space.device)
    learnt = set(process.learnt)
    trajectories.begin(number, latents)
    for step in range(len(process.times)):
        with torch.no_grad(), policy.in_use():  # no inference mode: the latents go into autograd later
            _, transition = process.forward(latents, labels, torch.full_like(labels, step))
        latents = next_latents(transition, noise.draw())
        if step in learnt:
            log_probs[step] = logprob.log_prob(transition, latents)
        trajectories.add(number, step, latents)
        yield
    with torch.no_grad():
        levels = ((space.decode(latents) + 1) * 127.5).round().to(torch.uint8)
    images = levels.permute(0, 2, 3, 1).cpu().numpy()
    return SampledBatch(rows.to(space.device), labels, seeds, log_probs), images
