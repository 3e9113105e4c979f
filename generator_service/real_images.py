"""The mounted dataset as arrays at the backend's size: for adaptation, and for finding near-copies."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from protocol.dataset import Dataset


@dataclass(frozen=True)
class RealImages:
    images: np.ndarray  # uint8 [N, H, W, 3]
    labels: np.ndarray  # int64 [N], index into the dataset's classes
    ids: list[str]

    @classmethod
    def read(cls, dataset: Dataset, size: tuple[int, int]) -> RealImages:
        """Every sample, resized to `size` = (height, width). Raises BadFile."""
        images = np.empty((len(dataset.samples), *size, 3), dtype=np.uint8)
        for index in range(len(dataset.samples)):
            images[index] = resized(dataset.image(index), size)
        labels = np.array([sample.label for sample in dataset.samples], dtype=np.int64)
        return cls(images, labels, [sample.id for sample in dataset.samples])


def resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3] at (height, width), unchanged when it has that size; resized as the backends do it."""
    if image.shape[:2] == size:
        return image
    return np.array(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC))
