"""Membership inference: how well an attacker who has only the synthetic set tells training images from others.

The attacker scores a real image by how near the nearest synthetic one is: the full black-box attack of GAN-Leaks (Chen
et al. 2020, section 5). Knows scores, the higher the likelier a member; not what they are made of.

Shapes: M members, N others, K points of a curve.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.privacy.intervals import Interval, wilson


@dataclass(frozen=True)
class Operating:
    """How many members are recognised where so many others are taken for members."""

    true_positive_rate: float
    interval: Interval  # of it, where the threshold is taken as given
    false_positive_rate: float  # that was allowed


def placements(members: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Of each member the part of the others that score lower, float64 [M], and of each other the part of the members
    that score higher, [N]; equal scores count half. The mean of either is the area under the ROC curve."""
    low, high = others.sort().values, members.sort().values
    below = torch.searchsorted(low, members) + torch.searchsorted(low, members, right=True)
    above = torch.searchsorted(high, others) + torch.searchsorted(high, others, right=True)
    return below.double() / (2 * len(others)), 1 - above.double() / (2 * len(members))


def auc(members: Tensor, others: Tensor) -> float:
    """Area under the ROC curve: the chance that a member scores higher than another image. 0.5: nothing leaks."""
    return placements(members, others)[0].mean().item()


def variance(members: Tensor, others: Tensor) -> float:
    """DeLong's estimate of the variance of `auc` (DeLong et al. 1988). M, N >= 2."""
    of_members, of_others = placements(members, others)
    return (of_members.var() / len(members) + of_others.var() / len(others)).item()


def auc_interval(members: Tensor, others: Tensor) -> Interval:
    """95 % interval of `auc`: Wilson's, of a rate over as many trials as would have DeLong's variance.

    DeLong's own interval shrinks to a point where the scores are apart, however few there are. So the trials are taken
    to be no more than 2 min(M, N), which is what they come to for a nearly perfect attack.
    """
    area, spread = auc(members, others), variance(members, others)
    most = 2.0 * min(len(members), len(others))
    return wilson(area, min(area * (1 - area) / spread, most) if spread > 0 else most)


def roc(members: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """False and true positive rates, float64 [K] each, from (0, 0) to (1, 1), one point for each distinct score."""
    scores = torch.cat([members, others]).unique().flip(0)

    def rates(of: Tensor) -> Tensor:
        ordered = of.sort().values
        reached = len(of) - torch.searchsorted(ordered, scores)
        return torch.cat([torch.zeros(1, dtype=torch.float64), reached.double() / len(of)])

    return rates(others), rates(members)


def recognised(members: Tensor, others: Tensor, false_positives: float = 0.01) -> Operating:
    """The most members that are recognised at this false positive rate, or at one other where it allows none."""
    allowed = max(false_positives, 1 / len(others))
    false, true = roc(members, others)
    reached = math.floor(allowed * len(others) + 1e-9) / len(others)
    rate = true[false <= reached + 1e-12].max().item()
    return Operating(rate, wilson(rate, len(members)), allowed)
