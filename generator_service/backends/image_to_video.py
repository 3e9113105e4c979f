"""Clips from a first frame and a text, with a model that takes the image natively: LTX-Video, as diffusers runs it.

All frames are denoised together, under one guidance scale. Knows nothing of requests or queues.

    B batch, M frames
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from generator_service.backends import autoencoder, clip_rows, hub
from generator_service.backends.device import Device, DType, pick_device
from generator_service.backends.interface import Abilities, OnStep, Row, Sampling, WeightSet
from generator_service.backends.ltx_checkpoint import LTXCheckpoint
from protocol.errors import ConfigError, InvalidRequest, UnsupportedField, WeightsCorrupt

COMPONENTS = ("transformer", "vae", "scheduler", "tokenizer", "text_encoder")
SAMPLERS = ("euler",)  # of its flow; the pipeline has no other


class Config(BaseModel):
    """Settings of the image-to-video backend."""

    model_config = ConfigDict(extra="forbid")

    checkpoint: str  # a diffusers folder, or a hub id such as "Lightricks/LTX-Video"
    revision: str | None = None  # branch, tag or commit on the hub; None: its main branch
    height: int = Field(default=512, ge=32, multiple_of=32)  # of a frame in pixels
    width: int = Field(default=704, ge=32, multiple_of=32)
    frame_rate: float = Field(default=25.0, gt=0.0, le=240.0)  # frames a second that motion is made for; low: fast
    device: Device = "auto"  # auto: the GPU where there is one
    dtype: DType = "float32"  # of the weights and of the forward passes; on a GPU bfloat16 is more than twice as fast
    vae_tiling: bool = False  # encode and decode large frames in overlapping tiles, which needs less memory
    compile: bool = False  # torch.compile the transformer: minutes once for each batch size, then faster


class ImageToVideoBackend:
    """An LTX-Video checkpoint. See `interface.Backend`. Beside it, one other full checkpoint is kept in memory."""

    name = "image_to_video"
    can = Abilities("text", schedulers=SAMPLERS, adaptations=(), makes="clip")
    classes: tuple[str, ...] = ()

    def __init__(self, config: Config):
        """Loads the base checkpoint. Raises ConfigError when it cannot be found, or is no LTX-Video."""
        self._config = config
        self._device = pick_device(config.device)
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        self._base = self._open(hub.locate(config.checkpoint, config.revision, COMPONENTS))
        self._other: LTXCheckpoint | None = None

    @property
    def folder(self) -> Path:
        """Where the base checkpoint lies."""
        return self._base.folder

    def native_size(self) -> tuple[int, int]:
        return self._config.height, self._config.width

    def prompt_length(self, prompt: str) -> tuple[int, int]:
        """See `interface.Backend`: as the base checkpoint's text encoder reads it."""
        return self._base.prompt_length(prompt)

    def beside_base(self) -> str:
        """See `interface.Backend`: there is none."""
        return ""

    def load(self, weights: WeightSet) -> None:
        """See `interface.Backend`. Raises WeightsCorrupt."""
        self._checkpoint(weights)

    def _checkpoint(self, weights: WeightSet) -> LTXCheckpoint:
        if weights.kind != "full":
            raise WeightsCorrupt(f"weights {weights.ref} are of kind {weights.kind!r}: this backend reads full ones")
        if weights.folder == self._base.folder:
            return self._base
        if self._other is None or self._other.folder != weights.folder:
            self._other = None  # before the next is read, so that two are never in memory
            self._other = self._open(weights.folder)
        return self._other

    def _open(self, folder: Path) -> LTXCheckpoint:
        checkpoint = LTXCheckpoint(folder, self._device, self._dtype)
        for name in ("height", "width"):
            if getattr(self._config, name) % checkpoint.ratio:
                raise ConfigError(f"{name} is no multiple of {checkpoint.ratio}: set one that is", param=name)
        if self._config.vae_tiling:
            checkpoint.pipeline.vae.enable_tiling()
        if self._config.compile:
            checkpoint.pipeline.transformer.compile()
        return checkpoint

    # ------------------------------------------------------------ generation

    def chosen(self, weights: WeightSet, rows: Sequence[Row], sampling: Sampling) -> Sequence[Row]:
        """See `interface.Backend`: nothing is left to choose. Raises InvalidRequest where a policy is asked for."""
        if sampling.policy:
            raise InvalidRequest("this backend has no policies: name steps and guidance_scale", param="model")
        return rows

    def generate(
        self, weights: WeightSet, rows: Sequence[Row], sampling: Sampling, on_step: OnStep = lambda done, total: None
    ) -> np.ndarray:
        """See `interface.Backend`. Equal to the bit at equal batch shape, on one machine; the first frame of a clip is
        the given one, to the pixel.

        Rows of the same steps and guidance scale are one batch. `sampling.strength` says nothing of clips.

        Raises InvalidRequest when a row has no image, when there are no frames to make, or too few steps;
        UnsupportedField for what the pipeline does not have: other samplers, resampling, guidance of each frame.
        """
        clip_rows.check(rows, weights, sampling, SAMPLERS)
        _check_supported(rows, sampling)
        checkpoint, size = self._checkpoint(weights), self.native_size()
        images = [autoencoder.fit(image, size) for image in clip_rows.first_frames(rows)]
        groups = clip_rows.together([(clip_rows.steps_of(row, sampling), _scale(row, sampling)) for row in rows])
        if any(steps < checkpoint.least_steps for steps, _ in groups):
            raise InvalidRequest(
                f"this checkpoint's schedule takes {checkpoint.least_steps} steps or more: ask for them",
                param="num_inference_steps",
            )
        progress, total = itertools.count(1), sum(steps for steps, _ in groups)
        clips = np.empty((len(rows), sampling.frames, *size, 3), dtype=np.uint8)
        for (steps, scale), members in groups.items():
            chosen = [rows[at] for at in members]
            clips[members] = checkpoint.clips(
                [images[at] for at in members],
                [row.prompt for row in chosen],
                [row.negative_prompt for row in chosen],
                [row.seed for row in chosen],
                frames=sampling.frames,
                steps=steps,
                guidance_scale=scale,
                frame_rate=self._config.frame_rate,
                report=lambda: on_step(next(progress), total),
            )
        clips[:, 0] = images
        return clips


def _scale(row: Row, sampling: Sampling) -> float:
    return max(row.guidance_scale, 1.0) if sampling.guided else 1.0


def _check_supported(rows: Sequence[Row], sampling: Sampling) -> None:
    if any(row.guidance is not None for row in rows):
        raise UnsupportedField(
            "this backend guides all frames of a clip alike: send guidance_scale, or use the backend ti2v",
            param="guidance",
        )
    if sampling.resampling:
        raise UnsupportedField(
            "this backend does not resample: leave resampling out, or use the backend ti2v", param="resampling"
        )
