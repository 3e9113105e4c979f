"""What every backend and every adaptation offers to the engine.

Knows nothing of HTTP, queues or jobs. Images on this boundary are always uint8 RGB, [H, W, 3] in a row and
[B, H, W, 3] in a batch; clips are [M, H, W, 3] and [B, M, H, W, 3]. A backend with other channels or a VAE converts
inside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from generator_service.real_images import RealImages
from protocol.messages import AdaptJob, WeightsRef
from protocol.video import GuidanceCurve

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

    @property
    def whole(self) -> WeightSet:
        """The full checkpoint at the bottom."""
        return self if self.base is None else self.base.whole


@dataclass(frozen=True)
class Row:
    """One image or clip to make."""

    seed: int  # its noise comes from a CPU torch.Generator with this seed and never depends on batch-mates
    label: int | None  # index into the weight set's classes; None: unconditional
    guidance_scale: float = 1.0
    prompt: str = ""
    negative_prompt: str | None = None
    image: np.ndarray | None = None  # uint8 [H, W, 3], any size: to start from, of a clip its first frame; None: noise
    guidance: GuidanceCurve | None = None  # of each frame of a clip; None: guidance_scale, of all frames alike
    steps: int | None = None  # of each frame of this clip, where a policy chose it; None: as `Sampling` says


@dataclass(frozen=True)
class Sampling:
    """What the rows of one batch share."""

    steps: int
    scheduler: str  # one of the backend's
    strength: float = 1.0  # rows with an image start from it, noised to this part of the schedule
    guided: bool = False  # two passes a step (conditional and null) as one call
    lora_scale: float = 1.0  # of a weight set that is a LoRA: 0 none of it
    frames: int | None = None  # M of each clip, the first one included; None: images
    resampling: int = 0  # of clips: repeats of each step by re-noising
    policy: bool = False  # the weight set's policy chooses steps and guidance of each row, see `Backend.chosen`


@dataclass(frozen=True)
class Abilities:
    """What a backend can be asked for."""

    conditioning: Literal["class", "text"]
    schedulers: tuple[str, ...]  # names of its samplers
    adaptations: tuple[str, ...]  # names of what adapts it
    blackens: bool = False  # images that its safety checker flags come out wholly black
    makes: Literal["image", "clip"] = "image"  # clips begin with an image, which every row must have


class Backend(Protocol):
    """A diffusion model with hot-swappable weight sets. Used from one thread only."""

    name: str
    can: Abilities
    folder: Path  # where its base checkpoint lies
    classes: tuple[str, ...]  # label index -> class name of the base checkpoint; empty when text-conditioned

    def native_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the images it makes."""
        ...

    def beside_base(self) -> str:
        """Hash of the models that an adaptation is made with and that are not of the base checkpoint; "" without any.
        May be called from any thread."""
        ...

    def prompt_length(self, prompt: str) -> tuple[int, int] | None:
        """(tokens of a prompt, the most that are read), both with those that begin and end it; None: any length is
        fine. May be called from any thread."""
        ...

    def load(self, weights: WeightSet) -> None:
        """Make a weight set resident; cheap when it already is. Raises WeightsCorrupt."""
        ...

    def chosen(self, weights: WeightSet, rows: Sequence[Row], sampling: Sampling) -> Sequence[Row]:
        """The rows as they are to be made: where `sampling.policy` is set, each with the steps and guidance that the
        weight set's policy finds best for it; else unchanged."""
        ...

    def generate(
        self, weights: WeightSet, rows: Sequence[Row], sampling: Sampling, on_step: OnStep = lambda done, total: None
    ) -> np.ndarray:
        """Denoise one batch of rows that are chosen. Returns uint8 [len(rows), H, W, 3], of clips
        [len(rows), M, H, W, 3]."""
        ...


@dataclass(frozen=True)
class Made:
    """A weight set that is written and can be published."""

    folder: Path  # holds the tensors; on the file system of the weight sets
    kind: str
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Progress:
    """State of an adaptation, after an optimiser step or a piece of what is done between two."""

    step: int
    steps: int
    loss: float | None  # of the step; None: no step was done, but features computed, or the model measured
    data: dict[str, Any] = field(default_factory=dict)  # what else its event tells, as JSON
    made: Made | None = None  # to be published now, while the adaptation goes on


class Adaptation(Protocol):
    """Fine-tunes a backend. A generator function, so that the engine can serve requests between its pieces."""

    def __call__(
        self,
        backend: Backend,
        base: WeightSet,
        real: RealImages,  # at the backend's native size
        classes: Sequence[str],
        job: AdaptJob,
        folder: Path,  # empty; the tensors of the new weight set are written here at the end
        unfinished: Path,  # a folder of this very job's, or room for one: it outlives the process, until that is done
    ) -> Iterator[Progress]:
        """Yields after each optimiser step, and wherever else it gets long; its return value is (kind, metadata) of the
        new weight set."""
        ...
