"""What every image backend and every adaptation offers to the engine.

Knows nothing of HTTP, queues or jobs. Images on this boundary are always uint8 RGB, [H, W, 3] in a row and
[B, H, W, 3] in a batch; a backend with other channels or a VAE converts inside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from protocol.messages import AdaptJob, WeightsRef

OnStep = Callable[[int, int], None]
"""Called after each denoising step with (steps done, steps in all). It may raise `protocol.errors.Cancelled`."""


@dataclass(frozen=True)
class WeightSet:
    """One named, versioned weight set on disk (`generator_service.weights` reads and writes it)."""

    ref: WeightsRef
    backend: str
    kind: str  # "full": a whole checkpoint; others: what the backend adds to `base`
    base: WeightSet | None  # None for "full"
    classes: tuple[str, ...]  # label index -> class name; empty when text-conditioned
    folder: Path  # holds the tensors
    created: float = 0.0
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One image to make."""

    seed: int  # its noise comes from a CPU torch.Generator with this seed and never depends on batch-mates
    label: int | None  # index into the weight set's classes; None: unconditional
    guidance_scale: float = 1.0
    prompt: str = ""
    negative_prompt: str | None = None
    image: np.ndarray | None = None  # uint8 [H, W, 3], any size; None: from noise


@dataclass(frozen=True)
class Sampling:
    """What the rows of one batch share."""

    steps: int
    scheduler: str  # "ddim" or "dpm-solver"
    strength: float = 1.0  # rows with an image start from it, noised to this part of the schedule
    guided: bool = False  # two passes a step (conditional and null) as one call


class Backend(Protocol):
    """A diffusion model with hot-swappable weight sets. Used from one thread only."""

    name: str
    conditioning: str  # "class" or "text"
    folder: Path  # where its base checkpoint lies
    classes: tuple[str, ...]  # label index -> class name of the base checkpoint; empty when text-conditioned

    def native_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the images it makes."""
        ...

    def load(self, weights: WeightSet) -> None:
        """Make a weight set resident; cheap when it already is. Raises WeightsCorrupt."""
        ...

    def generate(
        self, weights: WeightSet, rows: Sequence[Row], sampling: Sampling, on_step: OnStep = lambda done, total: None
    ) -> np.ndarray:
        """Denoise one batch. Returns uint8 [len(rows), H, W, 3]."""
        ...


@dataclass(frozen=True)
class Progress:
    """State of an adaptation after one optimiser step."""

    step: int
    steps: int
    loss: float


class Adaptation(Protocol):
    """Fine-tunes a backend. A generator function, so that the engine can serve requests between optimiser steps."""

    def __call__(
        self,
        backend: Backend,
        base: WeightSet,
        images: np.ndarray,  # uint8 [N, H, W, 3] at the backend's native size
        labels: np.ndarray,  # int64 [N], index into classes
        classes: Sequence[str],
        job: AdaptJob,
        folder: Path,  # empty; the tensors of the new weight set are written here at the end
    ) -> Iterator[Progress]:
        """Yields after each optimiser step; its return value is (kind, metadata) of the new weight set."""
        ...
