"""Real and synthetic images as one training set of equal-sized uint8 tensors.

Decodes and resizes; normalisation and augmentation belong to the task. Shapes: N rows, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from protocol.dataset import Dataset
from trainer import pool
from trainer.pool import Candidate


class Frame(NamedTuple):
    """The size that every image is brought to, and how."""

    height: int  # H, pixels
    width: int  # W, pixels
    crop: bool = True  # scaled until it covers the frame, and its centre cut out; false: stretched, nothing is lost


Size = int | Frame  # an int: a square of so many pixels a side, cropped


def framed(size: Size) -> Frame:
    """The frame that a size means."""
    return size if isinstance(size, Frame) else Frame(size, size)


def resized(image: np.ndarray, size: Size) -> Tensor:
    """uint8 of any height and width, [..., 3] -> uint8 [H, W, 3]: bicubic, antialiased."""
    frame = framed(size)
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
    """Images of a dataset that are decoded each time they are asked for; indexed by rows and slices like a tensor."""

    def __init__(self, dataset: Dataset, size: Size):
        self._dataset, self._size = dataset, size

    def __getitem__(self, rows: int | slice) -> Tensor:
        if isinstance(rows, int):
            return resized(self._dataset.image(rows), self._size)
        return torch.stack([self[row] for row in range(*rows.indices(len(self._dataset)))])


class RealImages(TorchDataset):
    """The real samples of one split, kept in memory when they fit. Items are (image uint8 [H, W, 3], label, False).

    Args:
        size: what each is brought to.
        cache_gib: memory they may take; past it they are decoded again in every epoch.
    """

    def __init__(self, dataset: Dataset, size: Size, cache_gib: float):
        self.dataset, self.frame = dataset, framed(size)
        self.labels = torch.tensor([entry.label for entry in dataset.samples])
        decoded = Decoded(dataset, self.frame)
        fits = len(dataset) * self.frame.height * self.frame.width * 3 <= cache_gib * 2**30
        self.images: Tensor | Decoded = decoded[:] if fits else decoded

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int, bool]:
        return self.images[index], int(self.labels[index]), False


def read(candidates: Sequence[Candidate], size: Size) -> Tensor:
    """Pixels of candidates, uint8 [N, H, W, 3]. Raises CheckpointCorrupt."""
    if not candidates:
        return torch.empty(0, *framed(size)[:2], 3, dtype=torch.uint8)
    return torch.stack([resized(image, size) for image in pool.images(candidates)])


class SyntheticImages(TorchDataset):
    """Candidates of one iteration, in memory. Items are (image uint8 [H, W, 3], label, True).

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
        """Only the rows where `keep` (bool [N]) is true."""
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
