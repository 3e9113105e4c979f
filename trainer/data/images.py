"""Real and synthetic images, or clips, as one training set of equal-sized uint8 tensors.

Decodes and resizes; normalisation and augmentation belong to the task. Shapes: N rows, M frames of a clip, H x W
pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from protocol.clips import spread
from protocol.dataset import Dataset
from protocol.errors import ConfigError
from trainer import pool
from trainer.pool import Candidate


class Frame(NamedTuple):
    """The size that every image, or every frame of a clip, is brought to, and how."""

    height: int  # H, pixels
    width: int  # W, pixels
    crop: bool = True  # scaled until it covers the frame, and its centre cut out; false: stretched, nothing is lost
    frames: int | None = None  # M: samples are clips, of each so many frames, evenly spread; None: they are images

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a sample: [H, W, 3] or [M, H, W, 3]."""
        return (() if self.frames is None else (self.frames,)) + (self.height, self.width, 3)

    @property
    def pictures(self) -> int:
        """How many images a sample is: M of a clip."""
        return self.frames or 1


Size = int | Frame  # an int: a square of so many pixels a side, cropped


def framed(size: Size) -> Frame:
    """The frame that a size means."""
    return size if isinstance(size, Frame) else Frame(size, size)


def resized(pixels: np.ndarray, size: Size) -> Tensor:
    """uint8 of any height and width, [..., 3] -> uint8 [H, W, 3]: bicubic, antialiased. Of a clip, [m, ..., 3] ->
    [M, H, W, 3], evenly spread.

    Raises:
        ConfigError: it is a clip and images are wanted, or the reverse.
    """
    frame = framed(size)
    if (pixels.ndim == 4) != (frame.frames is not None):
        raise ConfigError(KINDS[pixels.ndim == 4], param="task")
    if frame.frames is None:
        return _resized(pixels, frame)
    return torch.stack([_resized(pixels[index], frame) for index in spread(len(pixels), frame.frames)])


KINDS = {  # what is wrong, by whether the sample is a clip
    True: 'a sample is a clip, and the task wants images: set trainer.task = "video", or give it images',
    False: 'a sample is an image, and the task wants clips: set layout = "clips" for a dataset of clips, a backend '
    "that makes clips, or another trainer.task",
}


def _resized(image: np.ndarray, frame: Frame) -> Tensor:
    height, width = image.shape[:2]
    if (height, width) != frame[:2]:
        fitted = (frame.width, frame.height)
        if frame.crop:
            scale = max(frame.height / height, frame.width / width)
            fitted = (max(frame.width, round(width * scale)), max(frame.height, round(height * scale)))
        picture = Image.fromarray(image).resize(fitted, Image.Resampling.BICUBIC)
        left, top = (fitted[0] - frame.width) // 2, (fitted[1] - frame.height) // 2
        image = np.asarray(picture.crop((left, top, left + frame.width, top + frame.height)))
    return torch.from_numpy(np.array(image))  # a copy of our own: decoded pictures may be read-only


class Decoded:
    """Samples of a dataset that are decoded each time they are asked for; indexed by rows and slices like a tensor."""

    def __init__(self, dataset: Dataset, size: Size):
        self._dataset, self._frame = dataset, framed(size)

    def __getitem__(self, rows: int | slice) -> Tensor:
        if isinstance(rows, int):
            frames = self._frame.frames
            pixels = self._dataset.image(rows) if frames is None else self._dataset.clip(rows, frames)
            return resized(pixels, self._frame)
        chosen = range(*rows.indices(len(self._dataset)))
        found = torch.empty(len(chosen), *self._frame.shape, dtype=torch.uint8)
        for place, row in enumerate(chosen):
            found[place] = self[row]
        return found


class RealImages(TorchDataset):
    """The real samples of one split, kept in memory when they fit. Items are (image uint8 [H, W, 3], label, False); of
    clips [M, H, W, 3].

    Args:
        size: what each is brought to.
        cache_gib: memory they may take; past it they are decoded again in every epoch.
        labels: of each sample; None: the dataset's own.
    """

    def __init__(self, dataset: Dataset, size: Size, cache_gib: float, labels: Sequence[int] | None = None):
        self.dataset, self.frame = dataset, framed(size)
        self.labels = torch.tensor([entry.label for entry in dataset.samples] if labels is None else labels)
        decoded = Decoded(dataset, self.frame)
        fits = len(dataset) * math.prod(self.frame.shape) <= cache_gib * 2**30
        self.images: Tensor | Decoded = decoded[:] if fits else decoded

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int, bool]:
        return self.images[index], int(self.labels[index]), False


def read(candidates: Sequence[Candidate], size: Size) -> Tensor:
    """Pixels of candidates, uint8 [N, H, W, 3], of clips [N, M, H, W, 3].

    Raises:
        CheckpointCorrupt: a file of the run's folder is missing or was altered. ConfigError: as `resized`.
    """
    found = torch.empty(len(candidates), *framed(size).shape, dtype=torch.uint8)
    for row, pixels in pool.each_image(candidates):
        found[row] = resized(pixels, size)
    return found


class SyntheticImages(TorchDataset):
    """Candidates of one iteration, in memory. Items are (image uint8 [H, W, 3], of clips [M, H, W, 3], label, True).

    Args:
        images: their pixels, as `read` finds them.
    """

    def __init__(self, candidates: Sequence[Candidate], images: Tensor):
        self.candidates, self.images = list(candidates), images
        self.labels = torch.tensor([candidate.sample.label for candidate in candidates], dtype=torch.long)

    @classmethod
    def none(cls, size: Size) -> SyntheticImages:
        """No samples, of that size."""
        return cls([], read([], size))

    def subset(self, keep: Tensor) -> SyntheticImages:
        """Only the rows where `keep` (bool [N]) is true; itself where that is all: the pixels of clips are many."""
        if keep.all():
            return self
        candidates = [candidate for candidate, kept in zip(self.candidates, keep.tolist(), strict=True) if kept]
        return SyntheticImages(candidates, self.images[keep])

    def __len__(self) -> int:
        return len(self.candidates)

    def __getitem__(self, index: int) -> tuple[Tensor, int, bool]:
        return self.images[index], int(self.labels[index]), True


class StandIn(SyntheticImages):
    """Synthetic samples in the place of the real ones, as which they count. Items are (image, label, False)."""

    def __getitem__(self, index: int) -> tuple[Tensor, int, bool]:
        return self.images[index], int(self.labels[index]), False


Images = RealImages | SyntheticImages
