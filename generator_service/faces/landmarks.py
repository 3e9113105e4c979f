"""Action units by landmarks: a landmark model finds 68 points, geometry tells how far they are from a neutral face.

Without a neutral face of the clip the one of the population that the model was trained on stands in, so that what is
only somebody's build reads as weak expression; with it that cancels out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from generator_service.backends.device import Device, pick_device
from generator_service.faces import action_units
from generator_service.faces.interface import FaceReading
from generator_service.faces.landmark_model import LandmarkModel
from protocol.fields import Unit


class Config(BaseModel):
    """Which landmark model."""

    model_config = ConfigDict(extra="forbid")

    checkpoint: Path  # folder with its config.json and model.safetensors, see landmark_model
    device: Device = "auto"  # auto: the GPU where there is one
    min_presence: Unit = 0.5  # of a face, below which a frame has no landmarks and no intensities


class LandmarkReader:
    """Reads frames with a landmark model."""

    units = action_units.UNITS
    reads_pixels = True

    def __init__(self, config: Config):
        """Raises ConfigError when there is no such model, or no such device."""
        self.model = LandmarkModel.load(config.checkpoint, pick_device(config.device))
        self.identity = f"landmarks {self.model.digest} {config.min_presence}"
        self._min_presence = config.min_presence

    def read(self, frames: np.ndarray, neutral: np.ndarray | None = None) -> FaceReading:
        """See `FaceReader`."""
        presence, landmarks = self.model(frames)
        landmarks[presence < self._min_presence] = np.nan
        reading = self._reading(presence, landmarks, self.model.neutral[None])
        return reading if neutral is None else self.against(reading, self.read(neutral))

    def against(self, reading: FaceReading, neutral: FaceReading) -> FaceReading:
        """See `FaceReader`. A neutral frame without a face leaves its clip with the population's."""
        assert reading.landmarks is not None and neutral.landmarks is not None
        assert len(neutral) and len(reading) % len(neutral) == 0, (len(reading), len(neutral))
        missing = ~np.isfinite(neutral.landmarks).all(axis=(1, 2))
        own = np.where(missing[:, None, None], self.model.neutral, neutral.landmarks)
        own = np.repeat(own, len(reading) // len(neutral), axis=0)
        return self._reading(reading.presence, reading.landmarks, own)

    def stored(self, clip: str, frames: Sequence[int]) -> FaceReading | None:
        """None: it stores nothing."""
        return None

    def _reading(self, presence: np.ndarray, landmarks: np.ndarray, neutral: np.ndarray) -> FaceReading:
        intensity = action_units.intensities(landmarks, neutral)
        return FaceReading(presence, self.units, np.nan_to_num(intensity, nan=0.0), landmarks)
