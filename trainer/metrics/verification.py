"""How well embeddings tell whether two faces are the same person's, by pairs (LFW, Huang et al. 2007).

The accuracy on each fold, at the threshold that does best on the other folds. Knows scores of pairs; not what made
them.

Shapes: P pairs, D embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Distance = Literal["cosine", "euclidean"]


@dataclass(frozen=True)
class Verification:
    """Parts of one, over the folds."""

    accuracy: float  # mean
    deviation: float  # population standard deviation
    thresholds: list[float]  # of each fold, found on the others: pairs of this score and above are the same


def similarity(first: Tensor, second: Tensor, distance: Distance = "cosine") -> Tensor:
    """Score [P] of pairs of embeddings [P, D], the higher the more alike: the cosine, or the negated Euclidean distance
    of the normalised embeddings."""
    first, second = F.normalize(first, dim=1), F.normalize(second, dim=1)
    if distance == "cosine":
        return (first * second).sum(1)
    return -torch.linalg.vector_norm(first - second, dim=1)


def verify(scores: Tensor, same: Tensor, fold: Tensor) -> Verification:
    """Accuracy over folds.

    Args:
        scores: [P], finite. same: bool [P]. fold: int64 [P], two folds at least.
    """
    folds = fold.unique().tolist()
    assert len(folds) >= 2
    accuracies, thresholds = [], []
    for number in folds:
        held = fold == number
        threshold = best_threshold(scores[~held], same[~held])
        accuracies.append(((scores[held].double() >= threshold) == same[held]).double().mean().item())
        thresholds.append(threshold)
    found = torch.tensor(accuracies, dtype=torch.float64)
    return Verification(found.mean().item(), found.std(correction=0).item(), thresholds)


def best_threshold(scores: Tensor, same: Tensor) -> float:
    """The threshold of highest accuracy when scores at and above it are taken for the same person; midway between
    neighbouring scores, and of several the lowest.

    Args:
        scores: [P], P >= 1. same: bool [P].
    """
    values, which = scores.double().unique(return_inverse=True)  # ascending
    yes = torch.zeros_like(values, dtype=torch.int64).index_add_(0, which, same.long())
    no = torch.zeros_like(yes).index_add_(0, which, (~same).long())
    start = yes.new_zeros(1)
    below = torch.cat([start, no.cumsum(0)]), torch.cat([start, yes.cumsum(0)])  # of 0, 1, ... values that are below
    right = below[0] + (yes.sum() - below[1])
    cuts = torch.cat([values[:1] - 1.0, (values[1:] + values[:-1]) / 2, values[-1:] + 1.0])
    return cuts[right.argmax()].item()
