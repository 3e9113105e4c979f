"""How much work each caller's feedback may have on the queue. Each replica counts what it accepted itself.

Does not know what a work unit is, nor where the answers are.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence

from protocol.errors import QueueFull


class FeedbackQuota:
    """The unanswered units of every caller. Thread-safe."""

    def __init__(self, limit: int | None, answered: Callable[[Sequence[str]], int]):
        """
        Args:
            limit: unanswered units of one caller; None: any number.
            answered: how many of these units have an answer.
        """
        self._limit, self._answered = limit, answered
        self._lock = threading.Lock()
        self._asked: dict[str, dict[tuple[str, int], list[str]]] = defaultdict(dict)  # caller -> (run, feedback) -> ids

    def take(self, caller: str, run: str, feedback: int, units: list[str]) -> None:
        """Count the units of a feedback. A run that asks the same again, or begins anew, gives up what it had asked
        from there on. Who has nothing on the queue may ask for any number.

        Raises:
            QueueFull: too many of this caller's units are unanswered.
        """
        if self._limit is None:
            return
        with self._lock:
            kept = {at: ids for at, ids in self._asked[caller].items() if at[0] != run or at[1] < feedback}
            asked = [unit for ids in kept.values() for unit in ids]
            waiting = len(asked) - self._answered(asked) if asked else 0
            if waiting and waiting + len(units) > self._limit:
                raise QueueFull(f"{waiting} work units of yours wait already and at most {self._limit} may: ask later")
            self._asked[caller] = (kept if waiting else {}) | {(run, feedback): units}
