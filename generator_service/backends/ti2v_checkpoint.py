"""A text-to-video checkpoint of Stable Diffusion's kind (ModelScopeT2V's class), frozen.

Its UNet predicts all frames of a window at once; all else is as of a Stable Diffusion. Knows nothing of which frames
are given, nor of guidance.

    B batch, C channels, F frames of a window, h w height and width in latents
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet3DConditionModel

from generator_service.backends.components import read_json
from generator_service.backends.prompt_embedding import Conditions
from generator_service.backends.sd_checkpoint import SDCheckpoint
from protocol.errors import ConfigError


class TI2VCheckpoint(SDCheckpoint):
    """One checkpoint on one device."""

    unet_kind = UNet3DConditionModel

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, image_size: int | None = None):
        """
        Args:
            image_size: height and width of a frame in pixels; None: what the UNet was trained on.

        Raises ConfigError when the folder does not hold such a checkpoint; WeightsCorrupt when its tensors do not fit.
        """
        found = read_json(folder / "unet" / "config.json").get("_class_name")
        if found != self.unet_kind.__name__:
            raise ConfigError(
                f"{folder}/unet is a {found}, and clips take a {self.unet_kind.__name__}: use a text-to-video "
                'checkpoint of the kind of "ali-vilab/text-to-video-ms-1.7b"',
                param="checkpoint",
            )
        super().__init__(folder, device, dtype, image_size)

    def predict(self, latents: torch.Tensor, times: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """What the UNet predicts (noise, for prediction type "epsilon"), float32 [B, C, F, h, w].

        Args:
            latents: float [B, C, F, h, w], scaled as the sampler wants them. times: [B], of all frames of a row.
        """
        return self.unet(latents.to(self.dtype), times, conditions.embeddings).sample.float()
