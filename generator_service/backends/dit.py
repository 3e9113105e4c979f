"""Class-conditional generation with a diffusion transformer (DiT): from noise, or from an image, with guidance.

Serves any diffusers DiT checkpoint, with or without a VAE, and weight sets that replace its class embedding, add a LoRA
to its transformer, or bring a transformer of their own. Knows nothing of requests, queues or of how a set was made.

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

from generator_service.backends import adapters, denoising
from generator_service.backends.device import Device, DType, pick_device
from generator_service.backends.dit_checkpoint import DiTCheckpoint, Tables, write_tables
from generator_service.backends.dit_lora import add_lora
from generator_service.backends.hub import EMBEDDED, locate
from generator_service.backends.interface import Abilities, OnStep, Row, Sampling, WeightSet
from protocol.errors import InvalidRequest, WeightsCorrupt
from protocol.messages import WeightsRef

LETTERS = Path(__file__).parents[1] / "assets" / "letters_dit"
COMPONENTS = ("transformer", "scheduler", "vae")
CARRIERS = ("full", "transformer")  # kinds that bring the transformer; the others are on top of one


class Config(BaseModel):
    """Settings of the DiT backend."""

    model_config = ConfigDict(extra="forbid")

    checkpoint: str = EMBEDDED  # a diffusers DiT folder, a hub id such as "facebook/DiT-XL-2-256", or "embedded"
    revision: str | None = None  # branch, tag or commit on the hub; None: its main branch
    device: Device = "auto"  # auto: the GPU where there is one
    dtype: DType = "float32"  # of the weights and of the forward passes
    max_resident: int = Field(default=4, ge=2)  # weight sets in memory; the least recently used go, the base never


@dataclass(frozen=True)
class Resident:
    """What of a weight set is in memory."""

    checkpoint: DiTCheckpoint  # of the set that brings the transformer
    tables: Tables
    null: int  # label of the null class: the last row of this set's own tables
    adapter: str | None = None  # its LoRA in that transformer; None: it is none


class DiTBackend:
    """A DiT with hot-swappable weight sets. See `interface.Backend`.

    Weight sets of kind "class_embedding" and "lora" share the parameters of the checkpoint they sit on, so that
    changing between them costs nothing; a LoRA has the class tables of the set under it, and says all that is to be
    added to that one's transformer. Sets of kind "transformer" share the VAE of the full checkpoint at their bottom;
    sets of kind "full" are checkpoints of their own.
    """

    name = "dit"
    can = Abilities("class", schedulers=("ddim", "dpm-solver"), adaptations=("cold_start",))

    def __init__(self, config: Config):
        """Loads the base checkpoint. Raises ConfigError when it cannot be found, or is not a DiT."""
        self._device = pick_device(config.device)
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        self._max_resident = config.max_resident
        self._base = self._open(locate(config.checkpoint, config.revision, COMPONENTS, LETTERS))
        self._resident: OrderedDict[WeightsRef, Resident] = OrderedDict()

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
        """The frozen checkpoint under a weight set: what an adaptation builds on. It must not change its parameters.

        Raises InvalidRequest for a LoRA, which would be left out of what is built.
        """
        if weights.kind == "lora":
            raise InvalidRequest(
                f"weights {weights.ref} are a LoRA, and class embeddings are learnt on a checkpoint without: adapt "
                f"{carrier(weights).ref}",
                param="base",
            )
        return self._load(weights).checkpoint

    def resident(self, weights: WeightSet) -> Resident:
        """A weight set in memory. Raises WeightsCorrupt."""
        return self._load(weights)

    def save_tables(self, tables: Tables, base: WeightSet, folder: Path) -> None:
        """Write a "class_embedding" weight set that was learnt on the checkpoint under `base`."""
        write_tables(tables, folder, carrier(base).ref.digest)

    def _load(self, weights: WeightSet) -> Resident:
        if carrier(weights) is not weights:
            self._load(carrier(weights))  # stays younger than what sits on it, so that it is never dropped first
        if weights.ref not in self._resident:
            self._resident[weights.ref] = self._read(weights)
        self._resident.move_to_end(weights.ref)
        while len(self._resident) > self._max_resident:
            self._drop(next(iter(self._resident)))
        return self._resident[weights.ref]

    def _drop(self, ref: WeightsRef) -> None:
        """And with a transformer what sits on it, but for the base's, which stays in memory anyway."""
        gone = self._resident.pop(ref)
        if gone.adapter is not None:
            adapters.remove(gone.checkpoint.transformer, gone.adapter)
        elif gone.tables is gone.checkpoint.tables and gone.checkpoint is not self._base:
            for other in [other for other, kept in self._resident.items() if kept.checkpoint is gone.checkpoint]:
                del self._resident[other]

    def _read(self, weights: WeightSet) -> Resident:
        null = len(weights.classes)
        if weights.kind == "full":
            checkpoint = self._base if weights.folder == self._base.folder else self._open(weights.folder)
            if checkpoint.classes != weights.classes or checkpoint.size != self._base.size:
                raise WeightsCorrupt(f"weights {weights.ref}: {weights.folder} has other classes or another image size")
            return Resident(checkpoint, checkpoint.tables, null)
        if weights.kind == "transformer" and weights.base is not None:
            under, digest = self._load(weights.whole).checkpoint, weights.whole.ref.digest
            checkpoint = under.with_transformer(weights.folder / "transformer", weights.classes, digest)
            return Resident(checkpoint, checkpoint.tables, null)
        if weights.kind == "class_embedding" and weights.base is not None:
            under = carrier(weights)
            checkpoint = self._load(under).checkpoint
            return Resident(checkpoint, checkpoint.read_tables(weights.folder, null, under.ref.digest), null)
        if weights.kind == "lora" and weights.base is not None:
            return self._read_lora(weights)
        raise WeightsCorrupt(f"weights {weights.ref} are of kind {weights.kind!r}, which the DiT backend cannot read")

    def _read_lora(self, weights: WeightSet) -> Resident:
        under = conditioning(weights)
        if under.classes != weights.classes:
            raise WeightsCorrupt(f"weights {weights.ref} name other classes than {under.ref}, whose tables they use")
        below = self._resident.get(under.ref) or self._read(under)  # only to borrow its tables: it needs not stay
        checkpoint, adapter = self._load(carrier(weights)).checkpoint, adapters.named(weights.ref)
        add_lora(checkpoint.transformer, adapter, weights.folder, under.ref.digest, checkpoint.dtype)
        return Resident(checkpoint, below.tables, len(weights.classes), adapter)

    def _open(self, folder: Path) -> DiTCheckpoint:
        return DiTCheckpoint(folder, self._device, self._dtype)

    # ------------------------------------------------------------ generation

    def chosen(self, weights: WeightSet, rows: Sequence[Row], sampling: Sampling) -> Sequence[Row]:
        """See `interface.Backend`: nothing is left to choose."""
        return rows

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
        adapter = resident.adapter if sampling.lora_scale > 0 else None
        with resident.checkpoint.using(adapter, sampling.lora_scale), torch.inference_mode():
            return denoising.sample(resident.checkpoint, rows, sampling, partial(_predictor, resident), on_step)


def carrier(weights: WeightSet) -> WeightSet:
    """The set that brings the transformer of these: themselves, or one that they sit on."""
    return weights if weights.base is None or weights.kind in CARRIERS else carrier(weights.base)


def conditioning(weights: WeightSet) -> WeightSet:
    """The set that brings the class tables of these: themselves, or what a LoRA sits on."""
    return weights if weights.base is None or weights.kind != "lora" else conditioning(weights.base)


def _predictor(resident: Resident, rows: Sequence[Row], guided: bool) -> denoising.Predict:
    """The model on these rows' classes; guided: and on the null class."""
    labels = [resident.null if row.label is None else row.label for row in rows]
    labels += [resident.null] * len(rows) if guided else []
    classes = torch.tensor(labels, device=resident.checkpoint.device)
    return lambda noisy, times: resident.checkpoint.predict(noisy, times, classes, resident.tables)
