"""Drawn faces as landmarks and pictures, and readers that tests make up."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from generator_service.faces.interface import AbsoluteReader, FaceReading
from tests.expressions.portrait import UNITS, Identity, Pose, landmarks, render

WHO = Identity.drawn("somebody", 0)
SIZE = 32


def face(**units: float) -> np.ndarray:
    """Landmarks float64 [68, 2] of the world's drawn face, in eye distances."""
    assert set(units) <= set(UNITS), units
    return landmarks(WHO, np.array([units.get(unit, 0.0) for unit in UNITS]))


def drawn(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pictures, landmarks and units of one person's faces: mouths that open and brows that rise."""
    rng = np.random.default_rng(seed)
    units = np.zeros((count, len(UNITS)))
    for unit in ("AU01", "AU02", "AU26"):
        units[:, UNITS.index(unit)] = rng.random(count) * (np.arange(count) % 4 > 0)
    poses = [Pose(*rng.normal(0, (0.05, 0.05, 0.05)), 1 + rng.normal(0, 0.03)) for _ in range(count)]
    pictures, points = zip(*(render(WHO, *both, SIZE) for both in zip(units, poses, strict=True)), strict=True)
    return np.stack(pictures), np.stack(points), units


class RedReader(AbsoluteReader):
    """Reads the intensity of one unit from how red a frame is, and a face wherever it is not wholly black."""

    units = ("AU12",)
    identity = "red"
    reads_pixels = True

    def __init__(self) -> None:
        self.clips = 0

    def read(self, frames: np.ndarray, neutral: np.ndarray | None = None) -> FaceReading:
        self.clips += 1
        red = frames[..., 0].mean(axis=(1, 2)) / 255
        return FaceReading((red > 0).astype(float), self.units, red[:, None])


class StoredReader(RedReader):
    """Reads no pixels; has the readings of some clips."""

    reads_pixels = False

    def __init__(self, readings: dict[str, list[float]]) -> None:
        super().__init__()
        self._readings = readings

    def stored(self, clip: str, frames: Sequence[int]) -> FaceReading | None:
        if clip not in self._readings:
            return None
        values = np.array([[self._readings[clip][frame]] for frame in frames])
        return FaceReading(np.ones(len(values)), self.units, values)
