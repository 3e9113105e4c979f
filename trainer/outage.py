"""A peer of the trainer that is gone, and comes back. Knows nothing of who the peer is."""

from __future__ import annotations

import threading
import time

from protocol.errors import OnTheFlyError
from trainer.journal import Journal
from trainer.settings import ServiceConfig


class Outage:
    """Whether a peer is gone; says so once when it goes and once when it is back. Thread-safe."""

    def __init__(self, peer: str, config: ServiceConfig, journal: Journal):
        self.declared = False
        self._peer, self._config, self._journal = peer, config, journal
        self._since: float | None = None
        self._lock = threading.Lock()

    def failed(self, error: OnTheFlyError) -> None:
        """The peer did not answer. Past the grace time that is an outage."""
        with self._lock:
            self._since = self._since or time.monotonic()
            if not self.declared and time.monotonic() - self._since >= self._config.outage_grace_s:
                self.declared = True
                then = (
                    "training goes on without it" if self._config.on_outage == "continue" else "training waits for it"
                )
                self._journal.event("outage", f"{self._peer} is gone, {then}: {error}", peer=self._peer)

    @property
    def failing(self) -> bool:
        """Whether it did not answer the last time."""
        return self._since is not None

    def succeeded(self) -> None:
        """The peer answered."""
        with self._lock:
            if self.declared:
                self._journal.event("recovery", f"{self._peer} is back", peer=self._peer)
            self._since, self.declared = None, False
