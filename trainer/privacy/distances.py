"""Distances to the nearest image, exactly: which one it is and how far away, overall or within the same class.

Knows vectors and labels; neither where they come from nor what a distance means.

Shapes: N queries, M targets, D values of a vector.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_VALUES = 2**24  # of a table of distances, and of vectors in double precision, at a time: 128 MiB each


@dataclass(frozen=True)
class Nearest:
    """Of each query the nearest target. Where there is none to compare with, it is infinitely far and its index -1."""

    distance: Tensor  # float64 [N], Euclidean
    index: Tensor  # int64 [N]


def nearest(
    queries: Tensor, targets: Tensor, *, labels: tuple[Tensor, Tensor] | None = None, own: Tensor | None = None
) -> Nearest:
    """The nearest target of each query; of equally near ones the first.

    Integer vectors are compared exactly. Else the search rounds as |a - b|^2 = |a|^2 + |b|^2 - 2ab does in double
    precision, and the distance told is that of the difference itself.

    Args:
        queries: [N, D], any type. targets: [M, D].
        labels: of queries [N] and targets [M]; only equal ones are compared. None: all are.
        own: int64 [N], the target that each query itself is, which it is not compared with. None: it is none.
    """
    if labels is None:
        return _nearest(queries, targets, own)
    distance, index = _nothing(len(queries))
    for label in labels[0].unique():
        rows, others = ((of == label).nonzero().flatten() for of in labels)
        inside = None if own is None else torch.searchsorted(others, own[rows])
        found = _nearest(queries[rows], targets[others], inside)
        distance[rows] = found.distance
        some = found.index >= 0
        index[rows[some]] = others[found.index[some]]
    return Nearest(distance, index)


def _nothing(queries: int) -> tuple[Tensor, Tensor]:
    return torch.full((queries,), torch.inf, dtype=torch.float64), torch.full((queries,), -1)


def _nearest(queries: Tensor, targets: Tensor, own: Tensor | None) -> Nearest:
    distance, index = _nothing(len(queries))
    rows = max(1, CHUNK_VALUES // max(queries.shape[1], 1))
    for start in range(0, len(targets), rows):
        part = targets[start : start + rows].double()
        squares = part.square().sum(1)
        step = max(1, min(rows, CHUNK_VALUES // len(part)))
        for at in range(0, len(queries), step):
            chunk = queries[at : at + step].double()
            apart = torch.addmm(squares, chunk, part.T, alpha=-2.0)  # less |a|^2, which all have in common
            if own is not None:
                _exclude(apart, own[at : at + step] - start)
            least, which = apart.min(1)
            found = (chunk - part[which]).square().sum(1).sqrt()
            closer = least.isfinite() & (found < distance[at : at + step])
            distance[at : at + step][closer] = found[closer]
            index[at : at + step][closer] = which[closer] + start
    return Nearest(distance, index)


def _exclude(apart: Tensor, columns: Tensor) -> None:
    """Let each row of a table be infinitely far from its column, where it has one."""
    inside = ((columns >= 0) & (columns < apart.shape[1])).nonzero().flatten()
    apart[inside, columns[inside]] = torch.inf


def limits(distance: Tensor, labels: Tensor, classes: int, quantile: float) -> Tensor:
    """The quantile of each class's distances, float64 [C]; of all classes' together, where one has none that is finite.

    Args:
        distance: [N]; those that are infinite do not count, but one at least is finite. labels: [N]. classes: C.
    """
    finite = distance.isfinite()
    assert finite.any()
    pooled = distance[finite].quantile(quantile)
    own = [distance[finite & (labels == label)] for label in range(classes)]
    return torch.stack([values.quantile(quantile) if len(values) else pooled for values in own])
