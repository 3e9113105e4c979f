"""Watches a generator that is tuned by reward: how far it went, how alike its samples got, whether they are copies, and
whether one reward is bought with another (reward hacking).

Says what it found; what is done about it is not its business. Knows nothing of models or of how rewards are computed.

    n generated rows, D values of a feature, R rollouts
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from generator_service.rl.rewards import Bank
from protocol.tuning import GuardOptions

SIGNIFICANT = 3.0  # standard errors that a slope has to be from 0 to be a trend
ROWS = 256  # compared with the bank at a time


@dataclass(frozen=True)
class Observation:
    """What a rollout and its update showed."""

    kl: float  # mean of `dpok.distance`
    diversity: float | None  # `diversity` of the samples; None: no identity has two
    copy_distance: float  # mean of `nearest`
    components: Mapping[str, float]  # weight times raw mean of each that has a weight: `rewards.contributions`
    total: float  # their sum. Not eq. 11's, whose mean is about 0 in every rollout


@dataclass(frozen=True)
class Finding:
    """Something to be told in the job's events."""

    kind: Literal["kl", "diversity", "copies", "trend"]
    message: str
    breach: bool  # the tuned weights are no good any more; else only worth knowing


class Guard:
    """Has an eye on one tune job, from its first rollout on."""

    def __init__(self, options: GuardOptions):
        self._options = options
        self._first_diversity: float | None = None
        self._history: list[tuple[float, dict[str, float]]] = []  # (total, components) of the last rollouts

    def check(self, observation: Observation) -> list[Finding]:
        """What is wrong after one more rollout; what is NaN is wrong. To be called once a rollout, in their order."""
        if self._first_diversity is None:
            self._first_diversity = observation.diversity
        self._history.append((observation.total, dict(observation.components)))
        found = [self._kl(observation), self._diversity(observation), self._copies(observation)]
        return [finding for finding in found if finding] + self._trends()

    def state(self) -> dict[str, Any]:
        """As JSON."""
        return {"first_diversity": self._first_diversity, "history": [[all_, each] for all_, each in self._history]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """What `state` gave."""
        self._first_diversity = state["first_diversity"]
        self._history = [(all_, dict(each)) for all_, each in state["history"]]

    def _kl(self, observation: Observation) -> Finding | None:
        ceiling = self._options.kl_ceiling
        if not ceiling or observation.kl <= ceiling:
            return None
        message = f"distance to the frozen generator is {observation.kl:.3g}, above the ceiling of {ceiling:g}"
        return Finding("kl", message, breach=True)

    def _diversity(self, observation: Observation) -> Finding | None:
        if observation.diversity is None or self._first_diversity is None:
            return None
        floor = self._options.diversity_floor * self._first_diversity
        if observation.diversity >= floor:
            return None
        part = f"{self._options.diversity_floor:g} of the first rollout's {self._first_diversity:.3g}"
        message = f"samples of an identity are {observation.diversity:.3g} apart, less than {part}"
        return Finding("diversity", message, breach=True)

    def _copies(self, observation: Observation) -> Finding | None:
        least = self._options.copy_distance
        if least == 0 or observation.copy_distance >= least:
            return None
        message = f"samples are {observation.copy_distance:.3g} from their nearest real image, less than {least:g}"
        return Finding("copies", message, breach=True)

    def _trends(self) -> list[Finding]:
        """Components that fall while the total rises, over a full window; after telling, a new window begins."""
        self._history = self._history[-self._options.trend :]
        if len(self._history) < self._options.trend:
            return []
        slope, error = trend([all_ for all_, _ in self._history])
        if not slope > SIGNIFICANT * error:
            return []
        found = []
        for name in self._history[0][1]:
            falling, its_error = trend([each[name] for _, each in self._history])
            if falling < -SIGNIFICANT * its_error:
                message = f"{name} falls by {-falling:.3g} a rollout while the total rises by {slope:.3g}"
                found.append(Finding("trend", f"{message}: the generator may be buying reward with it", breach=False))
        if found:
            self._history = []
        return found


def trend(values: Sequence[float]) -> tuple[float, float]:
    """Least squares slope of R >= 3 values over their index, and its standard error."""
    steps = range(len(values))
    middle, mean = (len(values) - 1) / 2, math.fsum(values) / len(values)
    spread = math.fsum((step - middle) ** 2 for step in steps)
    slope = math.fsum((step - middle) * value for step, value in zip(steps, values, strict=True)) / spread
    residual = math.fsum(
        (value - mean - slope * (step - middle)) ** 2 for step, value in zip(steps, values, strict=True)
    )
    return slope, math.sqrt(residual / (len(values) - 2) / spread)


def diversity(features: Tensor, labels: Tensor) -> float | None:
    """Mean distance between two samples of an identity, over all such pairs; None where no identity has two.

    Args:
        features: [n, D]. labels: int64 [n].
    """
    pairs = (labels[:, None] == labels).triu(diagonal=1)
    if not pairs.any():
        return None
    return float(torch.cdist(features, features)[pairs].mean())


def nearest(features: Tensor, bank: Bank) -> Tensor:
    """Distance of each feature, of unit norm, to the nearest of the bank, whatever its class: [n].

    Args:
        features: [n, D].
    """
    closest = torch.cat([(rows @ bank.features.T).argmax(1) for rows in features.split(ROWS)])
    return (features - bank.features[closest]).norm(dim=1)  # exact, where the products round
