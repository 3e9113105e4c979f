"""Similarity to the nearest neighbours: what the Internet Explorer arm puts in the place of marginal sampling and of
variance of gradients (GenDataAgent 3.1, after Li et al. 2023a, who rank by the mean cosine similarity to the 15
nearest neighbours in the target set).

Neighbours are looked for in the whole target set, whatever their class: theirs has no labels. This module does not know
where features come from.

Shapes: N samples, M target samples, D features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.selection.feedback import Scored

ROWS = 1024  # compared with the target set at a time: memory is ROWS x M


def similarity(samples: Scored) -> Tensor:
    """Criterion: negated similarity [N], in [-1, 1], of each sample to its neighbours among the others. What is most
    like the rest is asked for first, as it is the likeliest query to bring more of the kind."""
    return -among(samples.features(), samples.neighbours).double()


def to_targets(features: Tensor, targets: Tensor, neighbours: int) -> Tensor:
    """Mean cosine similarity [N], in [-1, 1], to the nearest target samples.

    Args:
        features: [N, D]. targets: [M, D], M >= 1. neighbours: how many; all M where there are fewer.
    """
    targets = F.normalize(targets, dim=1)
    cosines = (F.normalize(rows, dim=1) @ targets.T for rows in features.split(ROWS))
    return torch.cat([_mean_of_highest(part, neighbours) for part in cosines])


def among(targets: Tensor, neighbours: int) -> Tensor:
    """`to_targets` [M] of each target sample and the M - 1 others; 0 of a single one.

    Args:
        targets: [M, D], M >= 1. neighbours: how many; all others where there are fewer.
    """
    targets = F.normalize(targets, dim=1)
    found = []
    for start, rows in zip(range(0, len(targets), ROWS), targets.split(ROWS), strict=True):
        cosines = rows @ targets.T
        own = torch.arange(len(rows), device=rows.device)
        cosines[own, start + own] = -torch.inf
        found.append(_mean_of_highest(cosines, min(neighbours, len(targets) - 1)))
    return torch.cat(found)


def _mean_of_highest(cosines: Tensor, neighbours: int) -> Tensor:
    """[N] of cosines [N, M]."""
    if neighbours == 0:
        return cosines.new_zeros(len(cosines))
    return cosines.topk(min(neighbours, cosines.shape[1]), dim=1).values.mean(1)
