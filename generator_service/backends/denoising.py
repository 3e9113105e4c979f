"""The sampling loop that every image backend shares: which rows take which steps, their noise, and the steps.

Knows nothing of models or of what they are conditioned on: the backend brings a function that predicts.

    B batch, C channels, H W height and width in pixels, h w in latents
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from diffusers import PNDMScheduler, SchedulerMixin

from generator_service.backends.interface import OnStep, Row, Sampling, WeightSet
from protocol.errors import InvalidRequest, UnknownClass

Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(latents [n B, C, h, w], times [n B]) -> the model's output, of the latents' shape. Guided: n = 2, and the first B
rows are conditional, the others not; else n = 1."""


class LatentSpace(Protocol):
    """What the loop has to know of a checkpoint. For a model of pixels, latents are those."""

    device: torch.device
    size: tuple[int, int]  # (H, W) of its images
    latent_shape: tuple[int, int, int]  # (C, h, w)

    def scheduler(self, name: str) -> SchedulerMixin: ...  # a fresh sampler
    def fit(self, image: np.ndarray) -> np.ndarray: ...  # uint8 [any, any, 3] -> uint8 [H, W, 3]
    def pixels(self, images: np.ndarray) -> torch.Tensor: ...  # uint8 [B, H, W, 3] -> [B, 3, H, W] in [-1, 1]
    def encode(self, images: np.ndarray) -> torch.Tensor: ...  # uint8 [B, H, W, 3] -> [B, C, h, w]
    def decode(self, latents: torch.Tensor) -> torch.Tensor: ...  # [B, C, h, w] -> [B, 3, H, W] in [-1, 1]


@dataclass(frozen=True)
class _Pass:
    """Rows of a batch that take the same steps."""

    members: list[int]  # which rows
    scheduler: SchedulerMixin
    times: torch.Tensor  # [calls of the model], from noise to image
    redraws: bool  # the rows start from their images


def sample(
    space: LatentSpace,
    rows: Sequence[Row],
    sampling: Sampling,
    predictor: Callable[[Sequence[Row], bool], Predict],
    on_step: OnStep,
) -> torch.Tensor:
    """Denoise a batch: RGB float32 [B, 3, H, W] in [-1, 1].

    Rows with an image run the last int(steps * strength) steps, as diffusers' img2img does; none of them is left when
    strength is small, and the row is the image itself. Each row has a generator of its own, on the CPU, which draws
    its first noise, and then that of its steps when the sampler adds any.

    Args:
        predictor: (rows, guided) -> the function that predicts for them.

    Raises InvalidRequest when the sampler cannot take so many steps, and what `on_step` raises.
    """
    passes = _plan(space, rows, sampling)
    progress, total = itertools.count(1), sum(len(part.times) for part in passes)
    images = torch.empty(len(rows), 3, *space.size, device=space.device)
    for part in passes:
        chosen = [rows[at] for at in part.members]
        predict = predictor(chosen, sampling.guided)
        images[part.members] = _run(space, part, chosen, sampling, predict, lambda: on_step(next(progress), total))
    return images


def check_labels(rows: Sequence[Row], weights: WeightSet) -> None:
    """Raises UnknownClass."""
    for row in rows:
        if row.label is not None and not 0 <= row.label < len(weights.classes):
            known = f"use 0 to {len(weights.classes) - 1}" if weights.classes else "they know none"
            raise UnknownClass(f"no class {row.label} in weights {weights.ref}: {known}", param="class_label")


def _plan(space: LatentSpace, rows: Sequence[Row], sampling: Sampling) -> list[_Pass]:
    """Rows from noise first, then rows from images: each kind is one batch, since they run other steps."""
    drawn = [at for at, row in enumerate(rows) if row.image is None or sampling.strength == 1]
    redrawn = [at for at, row in enumerate(rows) if row.image is not None and sampling.strength < 1]
    kinds = [(drawn, sampling.steps, False), (redrawn, int(sampling.steps * sampling.strength), True)]
    passes = []
    for members, steps, redraws in kinds:
        if members:
            scheduler = space.scheduler(sampling.scheduler)
            times = timesteps(scheduler, sampling.steps, space.device)[sampling.steps - steps :]
            passes.append(_Pass(members, scheduler, _calls(scheduler, times), redraws))
    return passes


def _run(
    space: LatentSpace,
    part: _Pass,
    rows: Sequence[Row],
    sampling: Sampling,
    predict: Predict,
    report: Callable[[], None],
) -> torch.Tensor:
    """One pass; RGB float32 [B, 3, H, W] in [-1, 1]."""
    images = np.stack([space.fit(row.image) for row in rows]) if part.redraws else None
    if images is not None and len(part.times) == 0:
        return space.pixels(images)
    scheduler = part.scheduler
    sources = [torch.Generator().manual_seed(row.seed) for row in rows]
    noise = torch.stack([torch.randn(space.latent_shape, generator=source) for source in sources]).to(space.device)
    if images is None:
        latents = noise * scheduler.init_noise_sigma
    else:
        latents = scheduler.add_noise(space.encode(images), noise, part.times[:1].expand(len(rows)))
    scales = torch.tensor([max(row.guidance_scale, 1.0) for row in rows], device=space.device)[:, None, None, None]
    options = step_options(scheduler, sources)
    for time in part.times:
        inputs = scheduler.scale_model_input(latents, time)
        noisy = torch.cat([inputs, inputs]) if sampling.guided else inputs
        output = predict(noisy, time.expand(len(noisy)))
        if sampling.guided:
            conditional, unconditional = output.chunk(2)
            output = unconditional + scales * (conditional - unconditional)
        latents = scheduler.step(output, time, latents, **options).prev_sample
        report()
    return space.decode(latents)


def timesteps(scheduler: SchedulerMixin, steps: int, device: torch.device) -> torch.Tensor:
    """The sampler's times [steps], descending. Raises InvalidRequest when it cannot take so many."""
    trained = scheduler.config.num_train_timesteps
    if steps <= trained:
        scheduler.set_timesteps(steps, device=device)
        times = scheduler.timesteps.unique().flip(0)
        if len(times) == steps and times.max() < trained:
            return times
    raise InvalidRequest(
        f"{steps} steps are too many for this sampler on a schedule of {trained}: ask for fewer",
        param="num_inference_steps",
    )


def _calls(scheduler: SchedulerMixin, times: torch.Tensor) -> torch.Tensor:
    """The times at which the model is called. PNDM takes its first step again with what the second one saw."""
    if isinstance(scheduler, PNDMScheduler) and len(times) > 1:
        return torch.cat([times[:2], times[1:]])
    return times


def step_options(scheduler: SchedulerMixin, sources: list[torch.Generator]) -> dict[str, object]:
    """What this sampler's `step` takes beside the usual."""
    known = inspect.signature(scheduler.step).parameters
    options: dict[str, object] = {"generator": sources} if "generator" in known else {}
    if "use_clipped_model_output" in known:
        # after clipping the clean image, DDIM's noise has to follow from it, as it does in DPM-Solver++
        options["use_clipped_model_output"] = bool(scheduler.config.clip_sample)
    return options
