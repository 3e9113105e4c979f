"""95 % confidence intervals of rates, and of any statistic of two samples. Knows numbers alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Interval = tuple[float, float]

Z = 1.959963984540054  # 97.5 % of the standard normal distribution lie below
RESAMPLES = 2000


def wilson(rate: float, trials: float) -> Interval:
    """Wilson's score interval of a rate (Wilson 1927); trials need not be whole, and are above 0."""
    shrunk = Z**2 / trials
    centre = (rate + shrunk / 2) / (1 + shrunk)
    half = Z / (1 + shrunk) * (rate * (1 - rate) / trials + shrunk / (4 * trials)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(
    statistic: Callable[[Tensor, Tensor], Tensor], one: Tensor, other: Tensor, generator: torch.Generator
) -> Interval:
    """Percentile interval of a statistic of two samples, each drawn anew with replacement (Efron 1979).

    Args:
        statistic: values [R, N] and [R, M] to [R]: R resamples at a time.
        one: [N]. other: [M].
    """
    found = []
    for _ in range(0, RESAMPLES, 100):  # so many at a time: memory is 100 (N + M)
        drawn = (values[torch.randint(len(values), (100, len(values)), generator=generator)] for values in (one, other))
        found.append(statistic(*drawn))
    low, high = torch.cat(found).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
