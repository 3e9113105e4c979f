"""A batch that does not fit on the GPU is made in halves, and those in halves again. Knows nothing of queues."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch

from generator_service.backends.interface import Backend, OnStep, Row, Sampling, WeightSet
from protocol.errors import GenerationFailed

log = logging.getLogger(__name__)


def generate(
    backend: Backend, weights: WeightSet, rows: Sequence[Row], sampling: Sampling, on_step: OnStep
) -> np.ndarray:
    """`Backend.generate`, in as many pieces as memory asks for; each time the log says so.

    Raises GenerationFailed when a single row does not fit, and what the backend raises.
    """
    try:
        return backend.generate(weights, rows, sampling, on_step)
    except torch.OutOfMemoryError as error:
        if len(rows) == 1:
            raise GenerationFailed(
                f"one {'image' if sampling.frames is None else 'clip'} does not fit into the GPU's memory: set a "
                "smaller size, a half-precision dtype, or options of the backend that need less"
            ) from error
    torch.cuda.empty_cache()  # after the handler, whose traceback kept the batch's tensors alive
    half = (len(rows) + 1) // 2
    log.warning(
        "a batch of %d does not fit into the GPU's memory: made in halves, whose pixels may differ in the last bits "
        "from those of the whole; lower generator.max_batch and agent.unit_size",
        len(rows),
        extra={"event": "batch_split", "rows": len(rows)},
    )
    return np.concatenate(
        [
            generate(backend, weights, part, sampling, _share(on_step, before, len(part), len(rows)))
            for before, part in ((0, rows[:half]), (half, rows[half:]))
        ]
    )


def _share(on_step: OnStep, before: int, size: int, rows: int) -> OnStep:
    """Steps of a part as steps of the whole."""
    return lambda done, total: on_step((before * total + size * done) // rows, total)
