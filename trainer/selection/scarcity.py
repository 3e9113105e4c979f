"""Which classes are scarce: recognised badly and rare (ARGen 3). Knows neither what recall was measured on, nor what is
done for them."""

from __future__ import annotations

import math
from collections.abc import Sequence


def scarce(recalls: Sequence[float | None], counts: Sequence[int], *, recall: float, part: float) -> list[int]:
    """Labels of the classes that are recognised in less than `recall` of the cases and are less than `part` of the
    samples, in ascending order.

    Args:
        recalls: of each class, in [0, 1]; None: not known, so that its rarity alone decides.
        counts: samples of each class.
    """
    total = sum(counts)
    return [
        label
        for label, (known, count) in enumerate(zip(recalls, counts, strict=True))
        if count < part * total and (known is None or known < recall)
    ]


def share(total: int, rounds: int, classes: int) -> int:
    """How many samples of each class to ask for in one of so many rounds, for about `total` in all; one at least."""
    return math.ceil(total / (rounds * classes))
