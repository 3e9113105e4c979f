"""Two ways of doing the same work, timed in turns, so that a machine's moods fall on both."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter, process_time
from typing import Any

Work = Callable[[], Any]


@dataclass(frozen=True)
class Comparison:
    first_s: float  # median seconds on the wall clock
    second_s: float
    ratio: float  # median over the rounds of first / second
    low: float  # quartiles of that ratio
    high: float
    cpu_ratio: float  # like ratio, of this process's CPU time: what other processes do to the clock is not in it

    def __str__(self) -> str:
        return (
            f"{self.first_s * 1e3:.1f} ms against {self.second_s * 1e3:.1f} ms: ratio {self.ratio:.3f} "
            f"(quartiles {self.low:.3f} to {self.high:.3f}; of CPU time {self.cpu_ratio:.3f})"
        )


def compare(first: Work, second: Work, rounds: int) -> Comparison:
    """Run both once unmeasured, then in turns; who begins alternates."""
    first(), second()
    times = []
    for number in range(rounds):
        if number % 2:
            then, now = _measure(second), _measure(first)
        else:
            now, then = _measure(first), _measure(second)
        times.append((*now, *then))
    first_s, first_cpu, second_s, second_cpu = zip(*times, strict=True)
    low, ratio, high = statistics.quantiles([a / b for a, b in zip(first_s, second_s, strict=True)], n=4)
    cpu_ratio = statistics.median(a / b for a, b in zip(first_cpu, second_cpu, strict=True))
    return Comparison(statistics.median(first_s), statistics.median(second_s), ratio, low, high, cpu_ratio)


def _measure(work: Work) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall, cpu = perf_counter(), process_time()
    work()
    return perf_counter() - wall, process_time() - cpu
