"""Clips from a first frame and a text, with a text-to-video checkpoint of ModelScopeT2V's class (ARGen 3.1 and 3.3).

The first frame is the given one, to the pixel; the others are made one after the other, of any number
(`ti2v_sampling`). Serves any diffusers `TextToVideoSDPipeline`, and weight sets that add a policy, which chooses steps
and guidance of each clip. Knows nothing of requests or queues, nor of how a policy is learnt.

    B batch, M frames, C channels, h w height and width in latents, T tokens, D width of the text embedding
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from generator_service.backends import autoencoder, clip_rows, hub
from generator_service.backends.device import Device, DType, pick_device
from generator_service.backends.guidance import frame_guidance
from generator_service.backends.interface import Abilities, OnStep, Row, Sampling, WeightSet
from generator_service.backends.prompt_embedding import Conditions
from generator_service.backends.ti2v_checkpoint import TI2VCheckpoint
from generator_service.backends.ti2v_sampling import SAMPLERS, Continuation, Predict, Process
from protocol.errors import InvalidRequest, WeightsCorrupt
from protocol.messages import WeightsRef

if TYPE_CHECKING:
    from generator_service.rl.sampling_policy import Chooser

COMPONENTS = ("unet", "vae", "scheduler", "tokenizer", "text_encoder")


class Config(BaseModel):
    """Settings of the text-and-image-to-video backend."""

    model_config = ConfigDict(extra="forbid")

    checkpoint: str  # a diffusers folder, or a hub id such as "ali-vilab/text-to-video-ms-1.7b"
    revision: str | None = None  # branch, tag or commit on the hub; None: its main branch
    image_size: int | None = Field(default=None, ge=8)  # height and width in pixels; None: what the UNet was trained on
    window: int = Field(default=16, ge=2, le=64)  # frames that the UNet sees at once: the new one and those before it.
    # Best what it was trained on; 2: the frame before alone. A step costs in proportion
    device: Device = "auto"  # auto: the GPU where there is one
    dtype: DType = "float32"  # of the weights and of the forward passes; on a GPU float16 is more than twice as fast
    attention: Literal["sdpa", "sliced"] = "sdpa"  # sliced: a head or so at a time; slower, needs less memory
    vae_slicing: bool = False  # encode and decode one frame at a time, which needs less memory; false: 16
    compile: bool = False  # torch.compile the UNet: minutes once for each batch size, then faster
    max_resident: int = Field(default=8, ge=1)  # policies in memory; the least recently used go


class TI2VBackend:
    """A text-to-video checkpoint with hot-swappable sampling policies. See `interface.Backend`.

    Weight sets of kind "policy" make clips as their base does. Beside the base checkpoint, one other full one is kept
    in memory.
    """

    name = "ti2v"
    can = Abilities("text", schedulers=SAMPLERS, adaptations=(), makes="clip")
    classes: tuple[str, ...] = ()

    def __init__(self, config: Config):
        """Loads the base checkpoint. Raises ConfigError when it cannot be found, or makes no clips."""
        self._config = config
        self._device = pick_device(config.device)
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        self._base = self._open(hub.locate(config.checkpoint, config.revision, COMPONENTS), config.image_size)
        self._other: TI2VCheckpoint | None = None
        self._policies: OrderedDict[WeightsRef, Chooser] = OrderedDict()

    @property
    def folder(self) -> Path:
        """Where the base checkpoint lies."""
        return self._base.folder

    def native_size(self) -> tuple[int, int]:
        return self._base.size

    def prompt_length(self, prompt: str) -> tuple[int, int]:
        """See `interface.Backend`: as the base checkpoint's text encoder reads it."""
        return self._base.prompt_length(prompt)

    def beside_base(self) -> str:
        """See `interface.Backend`: there is none."""
        return ""

    # ------------------------------------------------------------ weight sets

    def load(self, weights: WeightSet) -> None:
        """See `interface.Backend`. Raises WeightsCorrupt when the files do not fit what the set says of itself."""
        if weights.kind == "policy":
            self._policy(weights)
        elif weights.kind != "full":
            raise WeightsCorrupt(
                f"weights {weights.ref} are of kind {weights.kind!r}: this backend reads policy and full"
            )
        self.checkpoint(weights)

    def checkpoint(self, weights: WeightSet) -> TI2VCheckpoint:
        """The checkpoint at the bottom of a weight set."""
        folder = weights.whole.folder
        if folder == self._base.folder:
            return self._base
        if self._other is None or self._other.folder != folder:
            self._other = None  # before the next is read, so that two are never in memory
            self._other = self._open(folder, self._base.size[0])
        return self._other

    def _policy(self, weights: WeightSet) -> Chooser:
        from generator_service.rl.sampling_policy import read_policy  # late: it knows this package

        if weights.ref not in self._policies:
            policy, checkpoint = read_policy(weights.folder), self.checkpoint(weights)
            reads, given = (
                (policy.sizes.channels, policy.sizes.text_width),
                (checkpoint.latent_shape[0], checkpoint.width),
            )
            if reads != given:
                raise WeightsCorrupt(
                    f"the policy {weights.ref} reads latents of {reads[0]} channels and texts of width {reads[1]}, and "
                    f"{checkpoint.folder} has {given[0]} and {given[1]}: learn it again for this checkpoint"
                )
            self._policies[weights.ref] = policy
        self._policies.move_to_end(weights.ref)
        while len(self._policies) > self._config.max_resident:
            self._policies.popitem(last=False)
        return self._policies[weights.ref]

    def _open(self, folder: Path, image_size: int | None) -> TI2VCheckpoint:
        checkpoint = TI2VCheckpoint(folder, self._device, self._dtype, image_size)
        if self._config.attention == "sliced":
            checkpoint.unet.set_attention_slice("auto")
        if self._config.vae_slicing:
            checkpoint.vae.enable_slicing()
        if self._config.compile:
            checkpoint.unet.compile()
        return checkpoint

    # ------------------------------------------------------------ generation

    @torch.no_grad()
    def state(self, weights: WeightSet, rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
        """What a policy looks at: latents of the first frames E(x0), float32 [B, C, h, w], and embeddings of the
        prompts tau(y), float32 [B, T, D]; on the backend's device. Raises InvalidRequest."""
        checkpoint = self.checkpoint(weights)
        return _first(checkpoint, rows), checkpoint.conditions([row.prompt for row in rows]).embeddings.float()

    def chosen(self, weights: WeightSet, rows: Sequence[Row], sampling: Sampling) -> Sequence[Row]:
        """See `interface.Backend`: of the policy's actions, each row gets the one most likely (ARGen Algorithm 1, line
        14). Raises InvalidRequest when the weights have no policy."""
        if not sampling.policy:
            return rows
        if weights.kind != "policy":
            raise InvalidRequest(
                f"weights {weights.ref} have no policy that chooses steps and guidance: name both, or use weights of a "
                "policy job",
                param="model",
            )
        actions = self._policy(weights).best(*self.state(weights, rows))
        return [
            replace(row, steps=action.steps, guidance=action.guidance)
            for row, action in zip(rows, actions, strict=True)
        ]

    def generate(
        self, weights: WeightSet, rows: Sequence[Row], sampling: Sampling, on_step: OnStep = lambda done, total: None
    ) -> np.ndarray:
        """See `interface.Backend`. Equal to the bit at equal batch shape, on one machine.

        Rows that take the same number of steps are one batch. Guidance of a row counts where it has a curve, or where
        `sampling.guided` is set. `sampling.strength` says nothing of clips.
        """
        checkpoint = self.checkpoint(weights)
        made = self.sample(weights, rows, sampling, on_step)
        clips = np.empty((len(rows), sampling.frames, *checkpoint.size, 3), dtype=np.uint8)
        for clip, row, latents in zip(clips, rows, made, strict=True):
            clip[0] = checkpoint.fit(row.image)
            for at in range(0, len(latents), autoencoder.VAE_BATCH):
                part = latents[at : at + autoencoder.VAE_BATCH]
                clip[1 + at : 1 + at + len(part)] = autoencoder.levels(checkpoint.decode(part))
        return clips

    @torch.no_grad()
    def sample(
        self, weights: WeightSet, rows: Sequence[Row], sampling: Sampling, on_step: OnStep = lambda done, total: None
    ) -> torch.Tensor:
        """`generate` before it is decoded: scaled latents of the frames after the first, float32 [B, M - 1, C, h, w].

        Raises InvalidRequest when a row has no image, when there are no frames to make, or when the sampler cannot take
        so many steps; UnsupportedField when it is none of `SAMPLERS`.
        """
        clip_rows.check(rows, weights, sampling, SAMPLERS)
        checkpoint, frames = self.checkpoint(weights), sampling.frames
        first = _first(checkpoint, rows)
        fresh = partial(checkpoint.scheduler, sampling.scheduler)
        groups = [
            (members, Process.begin(fresh, steps, sampling.resampling, checkpoint.device))
            for steps, members in clip_rows.together([clip_rows.steps_of(row, sampling) for row in rows]).items()
        ]
        progress, total = itertools.count(1), sum(process.calls for _, process in groups) * (frames - 1)
        made = torch.empty(len(rows), frames - 1, *checkpoint.latent_shape, device=checkpoint.device)
        for members, process in groups:
            chosen = [rows[at] for at in members]
            sources = [torch.Generator().manual_seed(row.seed) for row in chosen]
            predict = _predictor(checkpoint, chosen)
            continuation = Continuation(process, predict, sources, lambda: on_step(next(progress), total))
            guidance = torch.stack([_guidance(row, sampling) for row in chosen])
            made[members] = continuation.frames(first[members], guidance, self._config.window)
        return made


def _first(checkpoint: TI2VCheckpoint, rows: Sequence[Row]) -> torch.Tensor:
    """Latents of the given frames, float32 [B, C, h, w]; those that several rows begin with are encoded once."""
    images = [checkpoint.fit(image) for image in clip_rows.first_frames(rows)]
    same = clip_rows.together([image.tobytes() for image in images])
    latents = torch.empty(len(rows), *checkpoint.latent_shape, device=checkpoint.device)
    encoded = checkpoint.encode(np.stack([images[members[0]] for members in same.values()]))
    for one, members in zip(encoded, same.values(), strict=True):
        latents[members] = one
    return latents


def _guidance(row: Row, sampling: Sampling) -> torch.Tensor:
    """Guidance of each frame, float32 [M]."""
    if row.guidance is not None:
        return torch.from_numpy(frame_guidance(row.guidance, sampling.frames)).float()
    return torch.full((sampling.frames,), row.guidance_scale if sampling.guided else 1.0)


def _predictor(checkpoint: TI2VCheckpoint, rows: Sequence[Row]) -> Predict:
    """The UNet on these rows' prompts, and on their negative prompts where there are two passes."""
    wanted = checkpoint.conditions([row.prompt for row in rows])
    both = Conditions.cat([wanted, checkpoint.conditions([row.negative_prompt for row in rows])])
    return lambda latents, times: checkpoint.predict(latents, times, both[: len(latents)])
