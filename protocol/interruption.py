"""Something that does not work for now and is tried again: said once when it begins, and once when it is over."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from protocol.errors import OnTheFlyError


class Interruption:
    """One kind of trouble, however often it is met. Thread-safe."""

    def __init__(
        self,
        began: Callable[[OnTheFlyError], None],
        over: Callable[[], None],
        *,
        quiet_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        """
        Args:
            began, over: say so.
            quiet_s: seconds without a failure after which it is over; longer than the pause between two tries, where
                several threads try.
            clock: seconds, from any origin.
        """
        self.on = False
        self._began, self._over, self._quiet_s = began, over, quiet_s
        self._clock = clock
        self._last = 0.0
        self._lock = threading.Lock()

    def failed(self, error: OnTheFlyError) -> None:
        with self._lock:
            self._last = self._clock()
            if not self.on:
                self.on = True
                self._began(error)

    def worked(self) -> None:
        """Something succeeded, if not this very thing."""
        with self._lock:
            if self.on and self._clock() - self._last >= self._quiet_s:
                self.on = False
                self._over()
