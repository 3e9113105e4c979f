"""Text-conditional generation with Stable Diffusion 1.x, 2.x or XL: from noise, or from an image, with guidance.

Serves any diffusers checkpoint of these kinds, and weight sets that are LoRAs of its UNet, with or without visual
tokens in the prompt (Real-Fake), or bring a UNet of their own. Knows nothing of requests, queues or of how a weight set
was made.

    B batch, H W height and width in pixels, D width of the text embedding
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from generator_service.backends import adapters, autoencoder, denoising, hub
from generator_service.backends.device import Device, DType, pick_device
from generator_service.backends.interface import Abilities, OnStep, Row, Sampling, WeightSet
from generator_service.backends.lora_sets import add_lora, read_class_means
from generator_service.backends.prompt_embedding import Conditions
from generator_service.backends.safety import SafetyChecker
from generator_service.backends.sd_checkpoint import SAMPLERS, SDCheckpoint
from protocol.errors import WeightsCorrupt
from protocol.messages import WeightsRef

COMPONENTS = (
    *("unet", "vae", "scheduler", "image_encoder"),
    *("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2"),
)
SAFETY = "safety_checker"
CARRIERS = ("full", "unet")  # kinds that bring the UNet; the others are on top of one


class Config(BaseModel):
    """Settings of the Stable Diffusion backend."""

    model_config = ConfigDict(extra="forbid")

    checkpoint: str  # a diffusers folder, or a hub id such as "stable-diffusion-v1-5/stable-diffusion-v1-5"
    revision: str | None = None  # branch, tag or commit on the hub; None: its main branch
    image_size: int | None = Field(default=None, ge=8)  # height and width in pixels; None: what the UNet was trained on
    device: Device = "auto"  # auto: the GPU where there is one
    dtype: DType = "float32"  # of the weights and of the forward passes; on a GPU bfloat16 is more than twice as fast
    attention: Literal["sdpa", "sliced"] = "sdpa"  # sliced: a head or so at a time; slower, needs less memory
    vae_tiling: bool = False  # decode large images in overlapping tiles, which needs less memory
    compile: bool = False  # torch.compile the UNet: minutes once for each batch size and each LoRA, then faster
    max_resident: int = Field(default=8, ge=1)  # LoRAs in memory; the least recently used go
    max_unets: int = Field(default=2, ge=1)  # weight sets with a UNet of their own in memory, beside the checkpoint's
    safety: Literal["off", "black"] = "off"  # black: images that the checkpoint's own checker flags come out black, and
    # trainers do not get them
    image_encoder: str | None = None  # CLIP vision model with projection, for visual tokens; None: the checkpoint's own


@dataclass(frozen=True)
class _Lora:
    """A resident LoRA."""

    checkpoint: SDCheckpoint
    adapter: str  # its name in the UNet
    class_means: torch.Tensor | None  # visual token of each class, [classes, D]; None: it was trained without


class StableDiffusionBackend:
    """A Stable Diffusion checkpoint with hot-swappable LoRAs. See `interface.Backend`.

    Weight sets of kind "lora" are adapters of the UNet they sit on, and say all that is to be added to it. Sets of kind
    "unet" bring a UNet of their own, and share the rest of the full checkpoint at their bottom. Beside the base, one
    other full checkpoint is kept in memory.
    """

    name = "stable_diffusion"
    can = Abilities("text", schedulers=tuple(SAMPLERS), adaptations=("lora",))
    classes: tuple[str, ...] = ()

    def __init__(self, config: Config):
        """Loads the base checkpoint. Raises ConfigError when it cannot be found, or is no Stable Diffusion."""
        self._config = config
        self._device = pick_device(config.device)
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        encoder = config.image_encoder
        self._image_encoder = None if encoder is None else hub.locate_model("image_encoder", encoder)
        checked = config.safety == "black"
        self.can = replace(type(self).can, blackens=checked)
        components = (*COMPONENTS, SAFETY) if checked else COMPONENTS
        self._base = self._open(hub.locate(config.checkpoint, config.revision, components), config.image_size)
        self._safety = SafetyChecker(self.folder / SAFETY, self._device, self._dtype) if checked else None
        self._other: SDCheckpoint | None = None
        self._unets: OrderedDict[WeightsRef, SDCheckpoint] = OrderedDict()
        self._loras: OrderedDict[WeightsRef, _Lora] = OrderedDict()

    @property
    def folder(self) -> Path:
        """Where the base checkpoint lies."""
        return self._base.folder

    def native_size(self) -> tuple[int, int]:
        return self._base.size

    def prompt_length(self, prompt: str) -> tuple[int, int]:
        """See `interface.Backend`: as the base checkpoint's text encoder reads it; CLIP's all have one vocabulary."""
        return self._base.prompt_length(prompt)

    def beside_base(self) -> str:
        """See `interface.Backend`: the image encoder."""
        return self._base.image_encoder_digest or ""

    # ------------------------------------------------------------ weight sets

    def load(self, weights: WeightSet) -> None:
        """See `interface.Backend`. Raises WeightsCorrupt when the files do not fit what the set says of itself."""
        if weights.kind == "lora":
            self._lora(weights)
        elif weights.kind in CARRIERS:
            self.checkpoint(weights)
        else:
            raise WeightsCorrupt(
                f"weights {weights.ref} are of kind {weights.kind!r}: this backend reads lora, unet and full"
            )

    def checkpoint(self, weights: WeightSet) -> SDCheckpoint:
        """The checkpoint under a weight set: what an adaptation builds on. It must not change its parameters, and
        adds adapters under names of its own; `SDCheckpoint.use` before each of its predictions."""
        under = carrier(weights)
        return self._unet(under) if under.kind == "unet" else self._full(under.folder)

    def _full(self, folder: Path) -> SDCheckpoint:
        if folder == self._base.folder:
            return self._base
        if self._other is None or self._other.folder != folder:
            gone, self._other = self._other, None  # before the next is read, so that two are never in memory
            for ref in [ref for ref, own in self._unets.items() if gone is not None and own.folder == gone.folder]:
                self._drop(self._unets.pop(ref))
            self._drop(gone)
            del gone
            self._other = self._open(folder, self._base.size[0])
        return self._other

    def _unet(self, weights: WeightSet) -> SDCheckpoint:
        whole = weights.whole
        checkpoint = self._full(whole.folder)
        if weights.ref not in self._unets:
            while len(self._unets) >= self._config.max_unets:  # before the next is read
                self._drop(self._unets.popitem(last=False)[1])
            self._unets[weights.ref] = self._prepared(checkpoint.with_unet(weights.folder / "unet", whole.ref.digest))
        self._unets.move_to_end(weights.ref)
        return self._unets[weights.ref]

    def _drop(self, gone: SDCheckpoint | None) -> None:
        """What sits on a UNet that leaves memory leaves with it."""
        for ref in [ref for ref, lora in self._loras.items() if lora.checkpoint is gone]:
            del self._loras[ref]

    def _lora(self, weights: WeightSet) -> _Lora:
        checkpoint = self.checkpoint(weights)
        if weights.ref not in self._loras:
            self._loras[weights.ref] = self._read(weights, checkpoint)
        self._loras.move_to_end(weights.ref)
        while len(self._loras) > self._config.max_resident:
            _, oldest = self._loras.popitem(last=False)
            adapters.remove(oldest.checkpoint.unet, oldest.adapter)
        return self._loras[weights.ref]

    def _read(self, weights: WeightSet, checkpoint: SDCheckpoint) -> _Lora:
        if weights.metadata.get("checkpoint") not in (None, carrier(weights).ref.digest):  # None: it was not recorded
            raise WeightsCorrupt(f"weights {weights.ref} were tuned on another base: serve that one, or tune again")
        visual = weights.metadata.get("visual", "none") != "none"
        encoder = weights.metadata.get("image_encoder")  # None: written before it was recorded
        if weights.metadata.get("visual") == "image" and encoder not in (None, checkpoint.image_encoder_digest):
            raise WeightsCorrupt(
                f"weights {weights.ref} were adapted with another image encoder, whose features mean something else: "
                "set image_encoder to that one, or adapt again"
            )
        width = checkpoint.unet.config.cross_attention_dim
        means = read_class_means(weights.folder, len(weights.classes), width) if visual else None
        adapter = adapters.named(weights.ref)
        add_lora(checkpoint.unet, weights.folder, adapter)
        return _Lora(checkpoint, adapter, means)

    def _open(self, folder: Path, image_size: int | None) -> SDCheckpoint:
        return self._prepared(SDCheckpoint(folder, self._device, self._dtype, image_size, self._image_encoder))

    def _prepared(self, checkpoint: SDCheckpoint) -> SDCheckpoint:
        """Its UNet and VAE as the settings want them."""
        if self._config.attention == "sliced":
            checkpoint.unet.set_attention_slice("auto")
        if self._config.vae_tiling:
            checkpoint.vae.enable_tiling()
        if self._config.compile:
            checkpoint.unet.compile()
        return checkpoint

    # ------------------------------------------------------------ generation

    def chosen(self, weights: WeightSet, rows: Sequence[Row], sampling: Sampling) -> Sequence[Row]:
        """See `interface.Backend`: nothing is left to choose."""
        return rows

    def generate(
        self, weights: WeightSet, rows: Sequence[Row], sampling: Sampling, on_step: OnStep = lambda done, total: None
    ) -> np.ndarray:
        """See `interface.Backend`. Equal to the bit at equal batch shape, on one machine."""
        levels = autoencoder.levels(self.sample(weights, rows, sampling, on_step))
        return levels if self._safety is None else self._safety(levels)

    @torch.no_grad()
    def sample(
        self, weights: WeightSet, rows: Sequence[Row], sampling: Sampling, on_step: OnStep = lambda done, total: None
    ) -> torch.Tensor:
        """`generate` before rounding and before the safety checker: float32 [B, 3, H, W] in [-1, 1].

        On a CPU in float32 a row differs by at most 1e-3, an eighth of an 8-bit level, from one batch to another.
        """
        denoising.check_labels(rows, weights)
        if weights.kind == "lora" and sampling.lora_scale > 0:
            lora = self._lora(weights)
            checkpoint, means = lora.checkpoint, lora.class_means
            checkpoint.use(lora.adapter, sampling.lora_scale)
        else:
            checkpoint, means = self.checkpoint(weights), None
            checkpoint.use(None)
        by_image = weights.metadata.get("visual") == "image"
        predictor = partial(_predictor, checkpoint, means, by_image)
        return denoising.sample(checkpoint, rows, sampling, predictor, on_step)


def carrier(weights: WeightSet) -> WeightSet:
    """The set that brings the UNet of these: themselves, or one that they sit on."""
    return weights if weights.base is None or weights.kind in CARRIERS else carrier(weights.base)


def _predictor(
    checkpoint: SDCheckpoint, class_means: torch.Tensor | None, by_image: bool, rows: Sequence[Row], guided: bool
) -> denoising.Predict:
    """The UNet on these rows' prompts and visual tokens; guided: and on their negative prompts, which have none."""
    visual = None if class_means is None else _visual_tokens(checkpoint, class_means, by_image, rows)
    conditions = checkpoint.conditions([row.prompt for row in rows], visual)
    if guided:
        conditions = Conditions.cat([conditions, checkpoint.conditions([row.negative_prompt for row in rows])])
    return lambda latents, times: checkpoint.predict(latents, times, conditions)


def _visual_tokens(
    checkpoint: SDCheckpoint, class_means: torch.Tensor, by_image: bool, rows: Sequence[Row]
) -> torch.Tensor:
    """Visual token of each row, float32 [B, D] on the checkpoint's device: the feature of its image, or the mean of
    its class; NaN where it has neither."""
    tokens = torch.full((len(rows), class_means.shape[1]), torch.nan)
    labelled = [at for at, row in enumerate(rows) if row.label is not None]
    tokens[labelled] = class_means[[rows[at].label for at in labelled]]
    pictured = [at for at, row in enumerate(rows) if by_image and row.image is not None]
    if pictured:
        images = np.stack([checkpoint.fit(rows[at].image) for at in pictured])
        tokens[pictured] = checkpoint.visual_features(images).cpu()
    return tokens.to(checkpoint.device)
