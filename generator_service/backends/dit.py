"""Class-conditional generation with a diffusion transformer (DiT): from noise, or from an image, with guidance.

Serves any diffusers DiT checkpoint, with or without a VAE, and weight sets that replace its class embedding. Knows
nothing of requests, queues or of how a weight set was adapted.

    B batch, C channels, H W height and width in pixels, h w in latents
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from generator_service.backends import denoising
from generator_service.backends.device import Device, DType, pick_device
from generator_service.backends.dit_checkpoint import DiTCheckpoint, Tables, write_tables
from generator_service.backends.hub import EMBEDDED, locate
from generator_service.backends.interface import Abilities, OnStep, Row, Sampling, WeightSet
from protocol.errors import WeightsCorrupt
from protocol.messages import WeightsRef

LETTERS = Path(__file__).parents[1] / "assets" / "letters_dit"
COMPONENTS = ("transformer", "scheduler", "vae")


class Config(BaseModel):
    """Settings of the DiT backend."""

    model_config = ConfigDict(extra="forbid")

    checkpoint: str = EMBEDDED  # a diffusers DiT folder, a hub id such as "facebook/DiT-XL-2-256", or "embedded"
    revision: str | None = None  # branch, tag or commit on the hub; None: its main branch
    device: Device = "auto"  # auto: the GPU where there is one
    dtype: DType = "float32"  # of the weights and of the forward passes
    max_resident: int = Field(default=4, ge=2)  # weight sets in memory; the least recently used go, the base never


@dataclass(frozen=True)
class _Resident:
    checkpoint: DiTCheckpoint
    tables: Tables
    null: int  # label of the null class: the last row of this set's own tables


class DiTBackend:
    """A DiT with hot-swappable weight sets. See `interface.Backend`.

    Weight sets of kind "class_embedding" share the parameters of the checkpoint they sit on, so that changing between
    them costs nothing; sets of kind "full" are checkpoints of their own.
    """

    name = "dit"
    can = Abilities("class", schedulers=("ddim", "dpm-solver"), adaptations=("cold_start",))

    def __init__(self, config: Config):
        """Loads the base checkpoint. Raises ConfigError when it cannot be found, or is not a DiT."""
        self._device = pick_device(config.device)
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        self._max_resident = config.max_resident
        self._base = self._open(locate(config.checkpoint, config.revision, COMPONENTS, LETTERS))
        self._resident: OrderedDict[WeightsRef, _Resident] = OrderedDict()

    @property
    def folder(self) -> Path:
        """Where the base checkpoint lies; with `classes`, what a weight store needs to list it."""
        return self._base.folder

    @property
    def classes(self) -> tuple[str, ...]:
        """Label index -> class name of the base checkpoint."""
        return self._base.classes

    def beside_base(self) -> str:
        """See `interface.Backend`: nothing."""
        return ""

    def prompt_length(self, prompt: str) -> None:
        """See `interface.Backend`: prompts only name a class."""

    def native_size(self) -> tuple[int, int]:
        return self._base.size

    # ------------------------------------------------------------ weight sets

    def load(self, weights: WeightSet) -> None:
        """See `interface.Backend`. Raises WeightsCorrupt when the files do not fit what the set says of itself."""
        self._load(weights)

    def checkpoint(self, weights: WeightSet) -> DiTCheckpoint:
        """The frozen checkpoint under a weight set: what an adaptation builds on. It must not change its parameters."""
        return self._load(weights).checkpoint

    def save_tables(self, tables: Tables, base: WeightSet, folder: Path) -> None:
        """Write a "class_embedding" weight set that was learnt on the checkpoint under `base`."""
        write_tables(tables, folder, base.whole.ref.digest)

    def _load(self, weights: WeightSet) -> _Resident:
        if weights.base is not None:
            self._load(weights.whole)  # stays younger than what sits on it, so that it is never dropped first
        if weights.ref not in self._resident:
            self._resident[weights.ref] = self._read(weights)
        self._resident.move_to_end(weights.ref)
        while len(self._resident) > self._max_resident:
            self._resident.popitem(last=False)
        return self._resident[weights.ref]

    def _read(self, weights: WeightSet) -> _Resident:
        if weights.kind == "full":
            checkpoint = self._base if weights.folder == self._base.folder else self._open(weights.folder)
            if checkpoint.classes != weights.classes or checkpoint.size != self._base.size:
                raise WeightsCorrupt(f"weights {weights.ref}: {weights.folder} has other classes or another image size")
            tables = checkpoint.tables
        elif weights.kind == "class_embedding" and weights.base is not None:
            checkpoint = self._load(weights.whole).checkpoint
            tables = checkpoint.read_tables(weights.folder, len(weights.classes), weights.whole.ref.digest)
        else:
            raise WeightsCorrupt(
                f"weights {weights.ref} are of kind {weights.kind!r}, which the DiT backend cannot read"
            )
        return _Resident(checkpoint, tables, null=len(weights.classes))

    def _open(self, folder: Path) -> DiTCheckpoint:
        return DiTCheckpoint(folder, self._device, self._dtype)

    # ------------------------------------------------------------ generation

    def generate(
        self, weights: WeightSet, rows: Sequence[Row], sampling: Sampling, on_step: OnStep = lambda done, total: None
    ) -> np.ndarray:
        """See `interface.Backend`. Equal to the bit at equal batch shape, on one machine.

        Rows with an image run the last int(steps * strength) steps, as diffusers' img2img does; none of them is left
        when strength is small, and the row is the image itself at the native size.
        """
        images = self.sample(weights, rows, sampling, on_step)
        levels = ((images + 1) * 127.5).round().to(torch.uint8)
        return levels.permute(0, 2, 3, 1).cpu().numpy()

    def sample(
        self, weights: WeightSet, rows: Sequence[Row], sampling: Sampling, on_step: OnStep = lambda done, total: None
    ) -> torch.Tensor:
        """`generate` before rounding: float32 [B, 3, H, W] in [-1, 1].

        On a CPU in float32 a row differs by at most 1e-3, an eighth of an 8-bit level, from one batch to another.
        """
        resident = self._load(weights)  # outside inference mode: adaptations put these parameters into autograd
        denoising.check_labels(rows, weights)
        with torch.inference_mode():
            return denoising.sample(resident.checkpoint, rows, sampling, partial(_predictor, resident), on_step)


def _predictor(resident: _Resident, rows: Sequence[Row], guided: bool) -> denoising.Predict:
    """The model on these rows' classes; guided: and on the null class."""
    labels = [resident.null if row.label is None else row.label for row in rows]
    labels += [resident.null] * len(rows) if guided else []
    classes = torch.tensor(labels, device=resident.checkpoint.device)
    return lambda noisy, times: resident.checkpoint.predict(noisy, times, classes, resident.tables)
