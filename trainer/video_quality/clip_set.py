"""A set of clips that is compared with others, wherever they lie; they are read when asked for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from protocol import clips
from protocol.dataset import Dataset
from trainer import pool
from trainer.data.images import Frame, resized
from trainer.pool import Candidate


@dataclass(frozen=True)
class ClipSet:
    """N clips. `read` gives those of some rows, so many frames of each: uint8 RGB [M, H, W, 3]."""

    texts: Sequence[str]  # class name of each
    subjects: Sequence[str | None]  # who is seen; None: not known
    read: Callable[[Sequence[int], int], Sequence[np.ndarray]]

    @classmethod
    def of_dataset(cls, dataset: Dataset, texts: Collection[str] | None = None) -> ClipSet:
        """`texts`: only clips of these classes; None: all."""
        rows = [row for row, entry in enumerate(dataset.samples) if texts is None or entry.class_name in texts]
        entries = [dataset.samples[row] for row in rows]
        return cls(
            [entry.class_name for entry in entries],
            [entry.subject for entry in entries],
            lambda wanted, frames: [dataset.clip(rows[row], frames) for row in wanted],
        )

    @classmethod
    def of_candidates(cls, candidates: Sequence[Candidate], dataset: Dataset) -> ClipSet:
        """Synthetic clips; the subject is that of the clip that the first frame is from, or else of their source. Their
        files are not checked again: a trainer does when it trains on them."""
        samples = [candidate.sample for candidate in candidates]

        def subject(name: str | None) -> str | None:
            return dataset.by_id(name).subject if name is not None and name in dataset else None

        def read(wanted: Sequence[int], frames: int) -> list[np.ndarray]:
            found = (pool.image(candidates[row]) for row in wanted)
            return [clip[clips.spread(len(clip), frames)] for clip in found]

        names = [
            dataset.classes[sample.label] if sample.class_name is None else sample.class_name for sample in samples
        ]
        return cls(names, [subject(sample.init_id or sample.source_id) for sample in samples], read)

    def __len__(self) -> int:
        return len(self.texts)

    def batches(self, rows: Sequence[int], frame: Frame, size: int) -> Iterator[Tensor]:
        """Clips of some rows, in that order: uint8 [at most `size`, M, H, W, 3], so many in memory at a time.

        Args:
            frame: M, H, W.
        """
        assert frame.frames is not None
        for start in range(0, len(rows), size):
            found = self.read(rows[start : start + size], frame.frames)
            yield torch.stack([resized(clip, frame) for clip in found])
