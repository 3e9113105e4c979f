"""Keeps a claim on a queue entry while its work is being done, from a thread of its own.

Knows nothing of the broker: it is given a function that renews the claim.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from protocol.errors import Retryable


class Lease:
    """Renews a claim every `every_s` seconds between entry and exit. A context manager.

    `lost` is set once the claim is another's: the work may be dropped, and finishing it all the same is harmless. A
    broker that cannot be reached is tried again at the next turn.
    """

    def __init__(self, renew: Callable[[], bool], every_s: float, name: str):
        """`renew` returns whether the claim is still ours."""
        self.lost = threading.Event()
        self._renew = renew
        self._every_s = every_s
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._keep, name=f"lease-{name}", daemon=True)

    def __enter__(self) -> Lease:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._released.set()
        self._thread.join()

    def _keep(self) -> None:
        while not self._released.wait(self._every_s):
            try:
                ours = self._renew()
            except Retryable:
                continue
            if not ours:
                self.lost.set()
                return
