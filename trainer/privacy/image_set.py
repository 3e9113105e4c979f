"""A set of labelled images that is compared with others, wherever its pictures lie; they are read when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from protocol.dataset import Dataset
from trainer import pool
from trainer.data.images import Frame, resized
from trainer.pool import Candidate

READ_ROWS = 256  # pictures, or frames, in memory at a time, at their own size


@dataclass(frozen=True)
class ImageSet:
    """N images, or clips. `pictures` gives those of some rows, each uint8 RGB [H, W, 3] or [M, H, W, 3]."""

    labels: Tensor  # int64 [N]
    names: Sequence[str]  # label -> class name
    ids: Sequence[str]
    pictures: Callable[[Sequence[int]], Sequence[np.ndarray]]

    @classmethod
    def of_dataset(cls, dataset: Dataset) -> ImageSet:
        labels = torch.tensor([entry.label for entry in dataset.samples])
        ids = [entry.id for entry in dataset.samples]
        read = dataset.clip if dataset.is_clips else dataset.image
        return cls(labels, dataset.classes, ids, lambda rows: [read(row) for row in rows])

    @classmethod
    def of_candidates(cls, candidates: Sequence[Candidate], names: Sequence[str]) -> ImageSet:
        labels = torch.tensor([candidate.sample.label for candidate in candidates], dtype=torch.long)
        ids = [candidate.sample.id for candidate in candidates]
        return cls(labels, names, ids, lambda rows: pool.images([candidates[row] for row in rows]))

    def __len__(self) -> int:
        return len(self.labels)

    def in_parts(self, frame: Frame) -> Iterator[Tensor]:
        """All images in order, a part at a time: uint8 [rows, H, W, 3], of clips [rows, M, H, W, 3]."""
        for rows in torch.arange(len(self)).split(max(1, READ_ROWS // frame.pictures)):
            yield torch.stack([resized(picture, frame) for picture in self.pictures(rows.tolist())])

    def class_of(self, row: int) -> str:
        return self.names[int(self.labels[row])]
