"""How well queries find pictures of their identity in a gallery: mAP, Rank-k and the CMC curve, as person
re-identification is evaluated (Zheng et al. 2015).

The single-gallery protocol of Market-1501: gallery pictures of the query's identity that the query's own camera took
are passed over, and queries that then have nothing to find are left out, and counted. Average precision is the mean of
the precision at each hit, without interpolation, as re-identification papers report it; the data set's first script
took trapezoids instead. Knows features and numbers of identities; not where they come from.

Shapes: Q queries, G gallery pictures, D features, R ranks, q rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Distance = Literal["cosine", "euclidean"]

ROWS = 256  # queries ranked at a time: memory is some multiples of ROWS x G


@dataclass(frozen=True)
class Labelled:
    """What is known of N pictures."""

    features: Tensor  # float [N, D]
    identities: Tensor  # int64 [N]; negative: nobody's, ranked but never a match
    cameras: Tensor  # int64 [N]; negative: not known, never passed over


@dataclass(frozen=True)
class Retrieval:
    """Parts of one, means over the queries that have something to find; all 0 where none has."""

    mean_average_precision: float
    cmc: list[float]  # [R]: part of the queries with a match among the first 1, 2, ..., R
    queries: int  # that have something to find
    without_match: int  # that have not


def retrieval(query: Labelled, gallery: Labelled, *, distance: Distance = "cosine", ranks: int = 50) -> Retrieval:
    """Rank the gallery for every query, nearest first, equal distances in the gallery's order.

    Args:
        distance: "cosine" (1 - cosine similarity) or "euclidean".
        ranks: R; ranks beyond the gallery's end repeat the last.
    """
    precisions, firsts = [], []
    for rows, distances in _distances(query.features, gallery.features, distance):
        found = query.identities[rows, None] == gallery.identities[None, :]
        found &= query.identities[rows, None] >= 0
        seen_by_it = (query.cameras[rows, None] == gallery.cameras[None, :]) & (query.cameras[rows, None] >= 0)
        precision, first = ranked(distances, found & ~seen_by_it, found & seen_by_it)
        precisions.append(precision)
        firsts.append(first)
    precision, first = torch.cat(precisions), torch.cat(firsts)
    answered = first >= 0
    queries, reached = int(answered.sum()), torch.bincount(first[answered].clamp(max=ranks), minlength=ranks + 1)
    share = reached[:ranks].cumsum(0).double() / max(queries, 1)
    return Retrieval(
        mean_average_precision=precision[answered].mean().item() if queries else 0.0,
        cmc=share.tolist(),
        queries=queries,
        without_match=len(first) - queries,
    )


def ranked(distances: Tensor, matches: Tensor, passed_over: Tensor) -> tuple[Tensor, Tensor]:
    """Average precision, and the place of the first match, of each query.

    Args:
        distances: [q, G], finite. matches, passed_over: bool [q, G], never both.

    Returns:
        float64 [q], 0 without a match; int64 [q], from 0, -1 without a match.
    """
    count, end = matches.sum(1), distances.shape[1]
    row, column = matches.nonzero(as_tuple=True)
    number = torch.arange(len(row)) - (count.cumsum(0) - count)[row]  # of a match among its query's, from 0
    columns = torch.full((len(distances), max(int(count.max()), 1)), end)
    columns[row, number] = column
    places = _places(distances.masked_fill(passed_over, torch.inf), columns).sort(dim=1).values  # nearest match first
    at_hits = torch.arange(1, places.shape[1] + 1).double() / (places + 1).double()
    precision = at_hits.masked_fill(places == end, 0.0).sum(1) / count.clamp(min=1)
    return precision, places[:, 0].masked_fill(count == 0, -1)


def _places(distances: Tensor, columns: Tensor) -> Tensor:
    """How many pictures come before those in these columns [q, m] of distances [q, G]; G where the column is G.

    Sorting values, and looking where one would go, is faster than sorting pictures; only where several pictures are
    equally far, the gallery's order is looked at.
    """
    real = columns < distances.shape[1]
    values = distances.gather(1, columns.clamp(max=distances.shape[1] - 1)).contiguous()
    ascending = torch.from_numpy(np.sort(distances.numpy(), axis=1))  # numpy's sort is faster than torch's
    places = torch.searchsorted(ascending, values)
    tied = (torch.searchsorted(ascending, values, right=True) - places > 1) & real
    row = tied.nonzero()[:, 0]
    earlier = torch.arange(distances.shape[1]) < columns[tied][:, None]
    places[tied] += ((distances[row] == values[tied][:, None]) & earlier).sum(1)
    return places.where(real, columns)


def _distances(query: Tensor, gallery: Tensor, distance: Distance) -> Iterator[tuple[slice, Tensor]]:
    """Chunks of queries, and their distances [q, G]; of Euclidean ones the squares, which rank alike."""
    if distance == "cosine":
        query, gallery = F.normalize(query, dim=1), F.normalize(gallery, dim=1)
    norms = gallery.square().sum(1)
    for start in range(0, len(query), ROWS):
        rows = slice(start, min(start + ROWS, len(query)))
        inner = query[rows] @ gallery.T
        yield rows, -inner if distance == "cosine" else norms - 2 * inner
