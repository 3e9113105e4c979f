"""When something that several threads ask, and that failed, may be asked again.

Knows nothing of what is asked.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from protocol.errors import OnTheFlyError

FIRST_S, LONGEST_S = 30.0, 600.0


class Rest:
    """A pause of `FIRST_S` after a failure. When it is over one caller tries; when that fails too, the next pause is
    twice as long, up to `LONGEST_S`. The others go on as soon as anything has worked. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        """`clock`: seconds, from any origin."""
        self._clock = clock
        self._error: OnTheFlyError | None = None
        self._pause_s = self._until = 0.0
        self._tried = False
        self._lock = threading.Lock()

    @property
    def reason(self) -> OnTheFlyError | None:
        """What failed; None: all is well."""
        return self._error

    def refusal(self) -> OnTheFlyError | None:
        """None: the caller may try, and must say what came of it. Otherwise what failed last."""
        with self._lock:
            if self._error is None:
                return None
            if self._tried or self._clock() < self._until:
                return self._error
            self._tried = True
            return None

    def failed(self, error: OnTheFlyError) -> None:
        with self._lock:
            resting = self._error is not None and self._clock() < self._until
            self._error = error
            if not resting:  # who began before the pause does not make it longer
                self._pause_s = min(2 * self._pause_s, LONGEST_S) or FIRST_S
                self._until = self._clock() + self._pause_s
                self._tried = False

    def worked(self) -> None:
        with self._lock:
            self._error, self._pause_s, self._tried = None, 0.0, False
