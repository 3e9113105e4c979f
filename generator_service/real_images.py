"""The mounted dataset at the backend's size, for adaptation, and small, for finding near-copies.

What would fill the memory stays in its files, and is decoded when it is asked for. Where clips are made, each sample is
a clip of a few frames: a real clip's, evenly spread, or a real image, standing still. Knows nothing of models.

Shapes: N samples, F frames, H W pixels; [F] where they are clips.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image

from protocol import clips
from protocol.dataset import Dataset

log = logging.getLogger(__name__)

KEEP_BYTES = 2**30  # of images kept in memory
TELL_S = 10.0  # between lines in the log, while a large dataset is read
SMALL = 64  # pixels a side, at most, of what near-copies are looked for with
SMALL_FRAME = 32  # the same of a frame of a clip, so that a clip of `FRAMES` takes no more memory than an image
FRAMES = 4  # of a clip, evenly spread (`clips.spread`)


class Pictures:
    """A dataset's images or clips, which are decoded anew whenever they are asked for; indexed as an array of them
    is."""

    def __init__(self, dataset: Dataset, size: tuple[int, int], frames: int | None = None):
        """`frames`: of each clip; None: images, of clips their first frame."""
        self._dataset, self._size, self._frames = dataset, size, frames
        self.shape = (len(dataset), *(() if frames is None else (frames,)), *size, 3)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """uint8 [rows, H, W, 3] or [rows, F, H, W, 3]. Raises BadFile."""
        numbers = np.arange(len(self))[rows]
        return _stacked(lambda at: self._read(int(numbers[at])), len(numbers), self.shape[1:])

    def _read(self, index: int) -> np.ndarray:
        if self._frames is not None and self._dataset.is_clips:
            return np.stack([resized(frame, self._size) for frame in self._dataset.clip(index, self._frames)])
        image = resized(self._dataset.image(index), self._size)
        return image if self._frames is None else np.broadcast_to(image, (self._frames, *image.shape))

    def digest(self) -> str:
        """SHA-256 of the files."""
        content = hashlib.sha256()
        for entry in self._dataset.samples:
            files = clips.frame_files(entry.path) if entry.path.is_dir() else [entry.path]
            for file in files:
                content.update(hashlib.sha256(file.read_bytes()).digest())
        return content.hexdigest()


@dataclass(frozen=True)
class RealImages:
    images: np.ndarray | Pictures  # uint8 [N, H, W, 3], of clips [N, F, H, W, 3]
    labels: np.ndarray  # int64 [N], index into the dataset's classes
    ids: list[str]
    captions: list[str | None]  # of each; None: it has none

    @classmethod
    def read(cls, dataset: Dataset, size: tuple[int, int], frames: int | None = None) -> RealImages:
        """Every sample, at `size` = (height, width); as clips of so many frames. Raises BadFile."""
        pictures = Pictures(dataset, size, frames)
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
    """What near-copies are looked for with: images [N, H, W, 3] at `SMALL` at most; of clips [N, M, H, W, 3] `FRAMES`
    frames, at `SMALL_FRAME` at most."""
    *_, height, width, channels = images.shape
    if len(images.shape) == 4:
        size = (min(height, SMALL), min(width, SMALL))
        return _stacked(lambda at: resized(images[at : at + 1][0], size), len(images), (*size, channels))
    size, chosen = (min(height, SMALL_FRAME), min(width, SMALL_FRAME)), clips.spread(images.shape[1], FRAMES)

    def frames(at: int) -> np.ndarray:
        clip = images[at : at + 1][0]
        return np.stack([resized(clip[frame], size) for frame in chosen])

    return _stacked(frames, len(images), (FRAMES, *size, channels))


def resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3] at (height, width), unchanged when it has that size; resized as the backends do it."""
    if image.shape[:2] == size:
        return image
    return np.array(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC))


def _stacked(make: Callable[[int], np.ndarray], count: int, shape: tuple[int, ...]) -> np.ndarray:
    """uint8 [count, *shape] of the images or clips that `make` gives, on all cores: decoders let go of the
    interpreter."""
    stack, told = np.empty((count, *shape), dtype=np.uint8), time.monotonic()
    with ThreadPoolExecutor() as pool:
        for at, image in enumerate(pool.map(make, range(count))):
            stack[at] = image
            if time.monotonic() - told >= TELL_S:
                log.info("%d of %d real samples are read", at + 1, count)
                told = time.monotonic()
    return stack
