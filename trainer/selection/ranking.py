"""Picking the lowest scores: over a whole set, or of each class. Knows nothing of what the scores mean.

Shapes: N samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

ROUNDING = 1e-9  # 0.29 * 100 is 28.999..., 0.1 * 30 is 3.000...04


def part(fraction: float, n: int) -> int:
    """ceil(fraction * n): one at least, where there are any and the fraction is not 0."""
    return math.ceil(fraction * n - ROUNDING)


def lowest(scores: Tensor, k: int) -> Tensor:
    """Indices of the k lowest scores, lowest first; equal scores in order of index.

    Args:
        scores: [N]. k: how many; at most N are returned.

    Returns:
        [min(k, N)], int64.
    """
    return torch.argsort(scores, stable=True)[:k]


def lowest_of_each_class(scores: Tensor, labels: Tensor, fraction: float) -> Tensor:
    """Indices of the ceil(fraction * n_j) lowest scores of each class j, lowest first over all classes.

    Args:
        scores: [N]. labels: [N], int64, non-negative. fraction: in [0, 1].

    Returns:
        [K], int64.
    """
    chosen = torch.zeros_like(labels, dtype=torch.bool)
    for members in _classes(scores, labels):
        chosen[members[: part(fraction, len(members))]] = True
    order = torch.argsort(scores, stable=True)
    return order[chosen[order]]


def keep(scores: Tensor, labels: Tensor, fraction: float) -> Tensor:
    """Which samples survive: of each class j, the floor(fraction * n_j) lowest scores are dropped, GenDataAgent eq. 7.

    Args:
        scores: [N], finite. labels: [N], int64, non-negative. fraction: in [0, 1].

    Returns:
        [N], bool, True to keep. Of equal scores the earlier index is dropped first.
    """
    assert 0.0 <= fraction <= 1.0 and bool(scores.isfinite().all())
    kept = torch.ones_like(labels, dtype=torch.bool)
    for members in _classes(scores, labels):
        kept[members[: math.floor(fraction * len(members) + ROUNDING)]] = False
    return kept


def _classes(scores: Tensor, labels: Tensor) -> Iterator[Tensor]:
    """The indices of each class's members, lowest score first; classes without any are empty."""
    by_score = torch.argsort(scores, stable=True)
    order = by_score[torch.argsort(labels[by_score], stable=True)]  # by class; within a class by score
    yield from order.split(torch.bincount(labels).tolist())
