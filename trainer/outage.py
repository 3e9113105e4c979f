"""What a run depends on, when it is gone or full, and when it is back. Knows nothing of what it is needed for."""

from __future__ import annotations

import threading
import time

from protocol.errors import BrokerFull, DiskFull, OnTheFlyError, ServiceUnreachable
from protocol.interruption import Interruption
from trainer.journal import Journal
from trainer.settings import ServiceConfig

RETRY_S = 1.0  # between tries, while something is full


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


class Peers:
    """The service and the broker, which may be gone; the disk and the broker's memory, which may be full."""

    def __init__(self, config: ServiceConfig, journal: Journal):
        self.service = Outage("the generator service", config, journal)
        self.broker = Outage("the broker", config, journal)
        self.disk = _fullness(journal, "disk", "there is room on the disk again")
        self.memory = _fullness(journal, "broker", "the broker has room again")

    @property
    def failing(self) -> bool:
        """Whether one did not answer the last time."""
        return self.service.failing or self.broker.failing

    @property
    def declared(self) -> bool:
        """Whether one is gone for longer than the grace time."""
        return self.service.declared or self.broker.declared

    def failed(self, error: OnTheFlyError) -> None:
        """A request to the service came to nothing; others than these mean that it is busy."""
        if isinstance(error, ServiceUnreachable):
            self.service.failed(error)
        elif isinstance(error, BrokerFull):
            self.memory.failed(error)
        elif isinstance(error, DiskFull):
            self.disk.failed(error)

    def accepted(self) -> None:
        """The service took feedback, which wants room on the broker, and it was noted."""
        self.service.succeeded()
        self.memory.worked()
        self.disk.worked()


def _fullness(journal: Journal, what: str, over: str) -> Interruption:
    return Interruption(
        lambda error: journal.event(f"{what}_full", error.message), lambda: journal.event(f"{what}_recovered", over)
    )
