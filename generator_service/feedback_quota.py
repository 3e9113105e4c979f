"""How much work each caller's feedback may have on the queue. Each replica counts what it accepted itself.

Does not know what a work unit is, nor where the answers are.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from protocol.errors import QueueFull

FORGOTTEN_S = 3600.0  # after which a unit counts no more: a broker may lose it, and then it is never answered


@dataclass(frozen=True)
class _Asked:
    run: str
    feedback: int
    units: list[str]  # those that were not answered when somebody last looked
    at: float  # monotonic


class FeedbackQuota:
    """The unanswered units of every caller. Thread-safe."""

    def __init__(
        self,
        limit: int | None,
        unanswered: Callable[[Sequence[str]], Sequence[str]],
        clock: Callable[[], float] = time.monotonic,
    ):
        """
        Args:
            limit: unanswered units of one caller; None: any number.
            unanswered: which of these units have no answer.
        """
        self._limit, self._unanswered, self._clock = limit, unanswered, clock
        self._lock = threading.Lock()
        self._asked: dict[str, list[_Asked]] = defaultdict(list)  # by caller

    @contextmanager
    def taking(self, caller: str, run: str, feedback: int, units: list[str]) -> Iterator[None]:
        """Count the units of a feedback, which is published within the block; when that fails they do not count.

        A run that asks the same again, or begins anew, gives up what it had asked from there on. Who has nothing on the
        queue may ask for any number.

        Raises:
            QueueFull: too many of this caller's units are unanswered.
        """
        if self._limit is None:
            yield
            return
        asked = self._take(self._limit, caller, run, feedback, units)
        try:
            yield
        except BaseException:
            with self._lock:
                self._asked[caller] = [other for other in self._asked[caller] if other is not asked]
            raise

    def _take(self, limit: int, caller: str, run: str, feedback: int, units: list[str]) -> _Asked:
        with self._lock:
            known = [unit for asked in self._asked[caller] for unit in asked.units]
        answered = set(known).difference(self._unanswered(known))  # the broker may take its time: not under the lock
        now = self._clock()
        with self._lock:
            left = [
                _Asked(asked.run, asked.feedback, [unit for unit in asked.units if unit not in answered], asked.at)
                for asked in self._asked[caller]
                if now - asked.at < FORGOTTEN_S and (asked.run != run or asked.feedback < feedback)
            ]
            waiting = sum(len(asked.units) for asked in left)
            if waiting and waiting + len(units) > limit:
                raise QueueFull(f"{waiting} work units of yours wait already and at most {limit} may: ask later")
            taken = _Asked(run, feedback, units, now)
            self._asked[caller] = [*(asked for asked in left if asked.units), taken]
        return taken
