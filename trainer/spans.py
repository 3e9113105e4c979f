"""Unions of time intervals: how long something went on, and what two things have in common. Knows no run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

Span = tuple[float, float]  # start and end, unix seconds


def spans(intervals: Iterable[Mapping[str, float]]) -> list[Span]:
    """The union of intervals, each with "start" and "end": disjoint spans in order of time."""
    joined: list[Span] = []
    for start, end in sorted((row["start"], row["end"]) for row in intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def intersection(first: Sequence[Span], second: Sequence[Span]) -> list[Span]:
    """What two unions of spans have in common."""
    both, i, j = [], 0, 0
    while i < len(first) and j < len(second):
        start, end = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        if start < end:
            both.append((start, end))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return both


def length(disjoint: Iterable[Span]) -> float:
    """Seconds in all."""
    return sum(end - start for start, end in disjoint)
