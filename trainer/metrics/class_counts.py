"""Whether classes that the model gets wrong were given more samples, and gained by it (GenDataAgent Figure 5).

Reads a run's record; measures nothing itself.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trainer.record import Record, Row

Split = Literal["training", "held-out"]


@dataclass(frozen=True)
class Relation:
    """For each class: how many synthetic samples were made of it, and an accuracy or a gain of accuracy."""

    split: Split  # whose accuracy it is
    labels: list[int]
    samples: list[int]
    values: list[float]

    @property
    def correlation(self) -> float | None:
        """Pearson's r of samples and values; None: one of them is the same for all classes."""
        if len(set(self.samples)) < 2 or len(set(self.values)) < 2:
            return None
        return statistics.correlation(self.samples, self.values)


def first(record: Record) -> Relation | None:
    """The first on-the-fly iteration: its samples, and the accuracy that the model had when they were asked for.

    None: there was no such iteration, or its class accuracies were not recorded.
    """
    begun = _stage_2(record)
    if not begun:
        return None
    asked = begun[0] - 1 - record.config.staleness  # the last iteration that was evaluated before
    return _relation(record, asked, None, begun[:1]) if asked >= 0 else None


def gained(record: Record) -> Relation | None:
    """Stage 2 as a whole: its samples, and the gain of accuracy from its beginning to its end. None: as in `first`."""
    begun = _stage_2(record)
    return _relation(record, begun[0] - 1, begun[-1], begun) if begun and begun[0] else None


def made(record: Record, iterations: Sequence[int]) -> Counter[str]:
    """Class name -> the synthetic samples that these iterations were given, dropped ones included."""
    wanted = set(iterations)
    return Counter(
        row["class"] for row in record.selection if row["iteration"] in wanted and row["fate"] not in ("stale", "pool")
    )


def _stage_2(record: Record) -> list[int]:
    """Iterations after the warm-up that are finished and were given synthetic samples."""
    first = record.config.warmup_iterations  # the pool of a synthetic run counts on iteration 0
    return [row["iteration"] for row in record.metrics if row["candidates"] and row["iteration"] >= first]


def _relation(record: Record, before: int, after: int | None, iterations: Sequence[int]) -> Relation | None:
    """The accuracy of iteration `before`, or its gain until `after`: of the training set as in the paper, or of the
    held-out one where that is the same for all classes."""
    rows = {row["iteration"]: row for row in record.metrics}
    counts, names = made(record, iterations), record.class_names()
    relation = None
    for split, field in (("training", "train_per_class"), ("held-out", "per_class")):
        values = _values(rows.get(before), rows.get(after) if after is not None else None, field)
        labels = [label for label, value in enumerate(values) if value is not None]
        if labels:
            samples = [counts[names.get(label, "")] for label in labels]
            relation = Relation(split, labels, samples, [values[label] for label in labels])
            if len(set(relation.values)) > 1:
                return relation
    return relation


def _values(before: Row | None, after: Row | None, field: str) -> list[float | None]:
    start = (before or {}).get(field) or []
    if after is None:
        return start
    return [None if a is None or b is None else b - a for a, b in zip(start, after.get(field) or [], strict=False)]
