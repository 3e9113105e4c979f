"""DiT cold start: a new label space on a frozen backbone (RL-identity, section 4.1).

The class embedding of every block is reset to zero and learnt anew on the target images with the standard denoising
objective; nothing else changes. Works on tables of its own, so the backend may serve requests between steps. Knows
nothing of jobs, of the dataset's files or of where weight sets are kept.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from generator_service.adapt.denoising import draw, wanted
from generator_service.backends.dit import DiTBackend
from generator_service.backends.dit_checkpoint import DiTCheckpoint, Tables
from generator_service.backends.interface import Progress, WeightSet
from generator_service.real_images import RealImages
from protocol.errors import ConfigError, TrainingDiverged
from protocol.messages import AdaptJob

LABEL_DROP = 0.1  # part of the rows trained with the null class, as in DiT


def cold_start(
    backend: DiTBackend,
    base: WeightSet,
    real: RealImages,
    classes: Sequence[str],
    job: AdaptJob,
    folder: Path,
    unfinished: Path,
) -> Generator[Progress, None, tuple[str, dict[str, Any]]]:
    """See `interface.Adaptation`. Returns ("class_embedding", metadata); equal to the bit for an equal job on a CPU.

    Labels are dropped once a row, for all blocks together, so that the null class is learnt as one condition.

    Raises TrainingDiverged when the loss is NaN or infinite; ConfigError when the backend runs in float16.
    """
    checkpoint = backend.checkpoint(base)
    if checkpoint.dtype == torch.float16:
        raise ConfigError('cold start in float16 loses small gradients: set the backend\'s dtype to "bfloat16"')
    assert real.images.shape[1:3] == checkpoint.size and real.labels.max() < len(classes)
    started = time.monotonic()
    latents, targets = checkpoint.encode(real.images[:]), torch.from_numpy(real.labels).to(checkpoint.device)
    tables = _zeros(checkpoint, len(classes))
    optimizer = torch.optim.AdamW(tables.values(), lr=job.learning_rate, weight_decay=0.0)
    rng = torch.Generator().manual_seed(job.seed)
    losses = []
    for step in range(1, job.steps + 1):
        chosen = torch.randint(len(latents), (job.batch_size,), generator=rng).to(checkpoint.device)
        dropped = torch.rand(job.batch_size, generator=rng).to(checkpoint.device) < LABEL_DROP
        conditions = targets[chosen].masked_fill(dropped, len(classes))
        loss = denoising_loss(checkpoint, tables, latents[chosen], conditions, rng)
        if not loss.isfinite():
            raise TrainingDiverged(f"cold start: loss {loss.item()} at step {step}; lower learning_rate")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        yield Progress(step, job.steps, losses[-1])
    backend.save_tables(tables, base, folder)
    metadata = job.model_dump(include={"steps", "batch_size", "learning_rate", "seed"}) | {
        "images": len(real.images),
        "loss": float(np.mean(losses[-max(1, job.steps // 10) :])),  # over the last tenth of the steps
        "seconds": time.monotonic() - started,  # what was served meanwhile counts too
    }
    return "class_embedding", metadata


def _zeros(checkpoint: DiTCheckpoint, classes: int) -> dict[str, torch.Tensor]:
    """Class embeddings of zeros to be trained, with a row for the null class, for every block."""
    return {
        name: torch.zeros(classes + 1, table.shape[1], device=checkpoint.device, requires_grad=True)
        for name, table in checkpoint.tables.items()
    }


def denoising_loss(
    checkpoint: DiTCheckpoint, tables: Tables, latents: torch.Tensor, labels: torch.Tensor, rng: torch.Generator
) -> torch.Tensor:
    """Mean squared error of the prediction at a random time each: the standard denoising objective; a scalar.

    Args:
        latents: float32 [B, C, h, w]. labels: int64 [B]. rng: on the CPU; draws noise, then times.
    """
    schedule = checkpoint.forward_process
    noise, times = (drawn.to(latents.device) for drawn in draw(schedule, latents.shape, rng))
    predicted = checkpoint.predict(schedule.add_noise(latents, noise, times), times, labels, tables)
    return F.mse_loss(predicted, wanted(schedule, latents, noise, times))
