"""The mounted dataset at the backend's size, for adaptation, and small, for finding near-copies.

What would fill the memory stays in its files, and is decoded when it is asked for. Knows nothing of models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image

from protocol.dataset import Dataset

KEEP_BYTES = 2**30  # of images kept in memory
SMALL = 64  # pixels a side, at most, of what near-copies are looked for with


class Pictures:
    """A dataset's images, which are decoded anew whenever they are asked for; indexed as an array of them is."""

    def __init__(self, dataset: Dataset, size: tuple[int, int]):
        self._dataset, self._size = dataset, size
        self.shape = (len(dataset), *size, 3)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """uint8 [rows, H, W, 3]. Raises BadFile."""
        numbers = np.arange(len(self))[rows]
        return _stacked(lambda at: resized(self._dataset.image(int(numbers[at])), self._size), len(numbers), self._size)

    def digest(self) -> str:
        """SHA-256 of the files."""
        content = hashlib.sha256()
        for entry in self._dataset.samples:
            content.update(hashlib.sha256(entry.path.read_bytes()).digest())
        return content.hexdigest()


@dataclass(frozen=True)
class RealImages:
    images: np.ndarray | Pictures  # uint8 [N, H, W, 3]
    labels: np.ndarray  # int64 [N], index into the dataset's classes
    ids: list[str]
    captions: list[str | None]  # of each; None: it has none

    @classmethod
    def read(cls, dataset: Dataset, size: tuple[int, int]) -> RealImages:
        """Every sample, at `size` = (height, width). Raises BadFile."""
        pictures = Pictures(dataset, size)
        labels = np.array([sample.label for sample in dataset.samples], dtype=np.int64)
        captions = [sample.caption for sample in dataset.samples]
        images = pictures[:] if np.prod(pictures.shape) <= KEEP_BYTES else pictures
        return cls(images, labels, [sample.id for sample in dataset.samples], captions)

    def digest(self) -> str:
        """Hash of the images and their labels."""
        images = self.images
        content = images.digest() if isinstance(images, Pictures) else hashlib.sha256(images.tobytes()).hexdigest()
        return hashlib.sha256(content.encode() + self.labels.tobytes()).hexdigest()


def small(images: np.ndarray | Pictures) -> np.ndarray:
    """Images [N, H, W, 3] at the size that near-copies are looked for with: `SMALL` at most."""
    size = (min(images.shape[1], SMALL), min(images.shape[2], SMALL))
    return _stacked(lambda at: resized(images[at : at + 1][0], size), len(images), size)


def resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3] at (height, width), unchanged when it has that size; resized as the backends do it."""
    if image.shape[:2] == size:
        return image
    return np.array(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC))


def _stacked(make: Callable[[int], np.ndarray], count: int, size: tuple[int, int]) -> np.ndarray:
    """uint8 [count, H, W, 3] of the images that `make` gives, on all cores: decoders let go of the interpreter."""
    stack = np.empty((count, *size, 3), dtype=np.uint8)
    with ThreadPoolExecutor() as pool:
        for at, image in enumerate(pool.map(make, range(count))):
            stack[at] = image
    return stack
