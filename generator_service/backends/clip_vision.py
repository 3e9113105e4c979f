"""CLIP's image features: what a visual token in a prompt is made of. Knows nothing of prompts.

N images, D width of the projection, P pixels a side that the encoder takes
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import CLIPVisionModelWithProjection
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from generator_service.backends.components import load_component

BATCH = 32  # images encoded at once, so that memory does not grow with the dataset


class ImageEncoder:
    """A frozen CLIP vision model with its projection."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype):
        """Raises ConfigError and WeightsCorrupt, as `load_component` does."""
        self._model = load_component(CLIPVisionModelWithProjection, folder, device, dtype, partial=True)
        self.width: int = self._model.config.projection_dim

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> torch.Tensor:
        """Images uint8 [N, H, W, 3] -> projected features float32 [N, D], not normalised."""
        model, side = self._model, self._model.config.image_size
        parts = (images[start : start + BATCH] for start in range(0, len(images), BATCH))
        return torch.cat(
            [model(clip_pixels(part, side).to(model.device, model.dtype)).image_embeds for part in parts]
        ).float()


def clip_pixels(images: np.ndarray, side: int) -> torch.Tensor:
    """Images uint8 [N, H, W, 3] as CLIP was trained on them: float32 [N, 3, P, P].

    The shorter side becomes P, the middle square is taken, and channels are normalised.
    """
    height, width = images.shape[1:3]
    shorter = min(height, width)
    size = (int(side * width / shorter), int(side * height / shorter))
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    squares = [
        Image.fromarray(image).resize(size, Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))
        for image in images
    ]
    scaled = np.stack([np.asarray(square) for square in squares]).astype(np.float32) / 255
    normalised = (scaled - np.float32(OPENAI_CLIP_MEAN)) / np.float32(OPENAI_CLIP_STD)
    return torch.from_numpy(normalised).permute(0, 3, 1, 2)
