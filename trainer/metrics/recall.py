"""How well classes of unequal size are recognised: recall of each, and its unweighted and weighted mean (ARGen 4.1).

Knows labels; not what made them. Shapes: N samples, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, pstdev
from typing import NamedTuple

import torch
from torch import Tensor


def confusion(labels: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """How many samples of each class (row) were taken for each class (column), int64 [C, C].

    Args:
        labels, predicted: int64 [N], in [0, C).
    """
    return torch.bincount(labels * classes + predicted, minlength=classes * classes).view(classes, classes)


def recalls(table: Tensor) -> list[float | None]:
    """Of each class the part that was recognised, from `confusion`; None: it has no samples."""
    rights, totals = table.diagonal().tolist(), table.sum(1).tolist()
    return [right / total if total else None for right, total in zip(rights, totals, strict=True)]


def uar(table: Tensor) -> float:
    """Unweighted average recall: the mean over the classes that have samples, however many."""
    return mean(recall for recall in recalls(table) if recall is not None)


def war(table: Tensor) -> float:
    """Weighted average recall: the part of all samples that was recognised."""
    return float(table.diagonal().sum()) / float(table.sum())


class BySubject(NamedTuple):
    """The part of a subject's samples that was recognised, over subjects."""

    subjects: int
    mean: float
    deviation: float  # standard deviation, of the population; 0 of one subject


def by_subject(labels: Tensor, predicted: Tensor, subjects: Sequence[str | None]) -> BySubject | None:
    """Recognition of each subject alone. None: no sample says whom it shows; one that does not is left out."""
    seen: dict[str, list[bool]] = {}
    for subject, right in zip(subjects, (labels == predicted).tolist(), strict=True):
        if subject is not None:
            seen.setdefault(subject, []).append(right)
    parts = [mean(rights) for rights in seen.values()]
    return BySubject(len(parts), mean(parts), pstdev(parts)) if parts else None
