"""Stable Diffusion's safety checker: flagged images come out black. Knows nothing of prompts."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

from generator_service.backends.clip_vision import clip_pixels
from generator_service.backends.components import load_component

log = logging.getLogger(__name__)


class SafetyChecker:
    """The checker of one checkpoint, frozen."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype):
        """Raises ConfigError and WeightsCorrupt, as `load_component` does."""
        self._model = load_component(StableDiffusionSafetyChecker, folder, device, dtype)
        self.flagged = 0  # images so far

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Images uint8 [B, H, W, 3]; those flagged are black in the result."""
        inputs = clip_pixels(images, self._model.config.vision_config.image_size)
        inputs = inputs.to(self._model.device, self._model.dtype)
        _, flagged = self._model(images=torch.zeros(len(images)), clip_input=inputs)
        if any(flagged):
            self.flagged += sum(flagged)
            log.warning(
                "the safety checker flagged %d of %d images, which are black now",
                sum(flagged),
                len(images),
                extra={"event": "images_flagged", "images": sum(flagged), "so_far": self.flagged},
            )
        return np.where(np.array(flagged)[:, None, None, None], np.uint8(0), images)
