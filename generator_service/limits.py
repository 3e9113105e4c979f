"""How much one caller may ask for, and how much all of them together may have in hand. Each replica counts for itself.

Knows callers by their names, and nothing of keys, HTTP or what is asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pydantic import BaseModel, ConfigDict, Field

from protocol.errors import BodyTooLarge, RateLimited


class LimitsConfig(BaseModel):
    """The table [generator.limits]. What is said of a caller holds for the owner of each key; without keys, all are
    one."""

    model_config = ConfigDict(extra="forbid")

    requests_per_minute: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)  # a caller's; None: any number
    burst: int = Field(default=60, ge=1)  # requests that a caller may save up for doing at once
    waiting_images: int | None = Field(default=None, ge=1)  # a caller's, of clips frames; None: max_waiting_rows alone
    unfinished_jobs: int | None = Field(default=None, ge=1)  # a caller's; None: max_unfinished_jobs alone
    feedback_units: int | None = Field(default=None, ge=1)  # a caller's, unanswered; None: broker.work_gate alone

    connections: int = Field(default=1000, ge=1)  # open at a time; event streams are among them
    head_s: float = Field(default=10.0, gt=0.0)  # for a connection to send a request's first lines
    idle_s: float = Field(default=75.0, gt=0.0)  # between two requests; longer than clients and proxies wait
    body_s: float = Field(default=120.0, gt=0.0)  # for a request's body to arrive
    body_values: int = Field(default=500_000, ge=1000)  # JSON values in a body: many small ones hold all others up
    bodies_bytes: int = Field(default=2**29, ge=2**16)  # of all requests in hand; more are told to come back
    job_results_bytes: int = Field(default=2**28, ge=0)  # of finished jobs; the oldest of them go first


class RateLimit:
    """A token bucket for each caller. Used from one event loop; callers are few, for they have names."""

    def __init__(self, per_minute: float | None, burst: int, clock: Callable[[], float] = time.monotonic):
        """`per_minute`: None: no limit."""
        self._per_s = None if per_minute is None else per_minute / 60
        self._burst, self._clock = burst, clock
        self._buckets: dict[str, tuple[float, float]] = {}  # name -> tokens left, at this time

    def take(self, caller: str) -> None:
        """One request. Raises RateLimited, which says when the next one may come."""
        if self._per_s is None:
            return
        now = self._clock()
        left, then = self._buckets.get(caller, (float(self._burst), now))
        left = min(float(self._burst), left + (now - then) * self._per_s)
        if left < 1.0:
            raise RateLimited(
                f"more than {self._per_s * 60:g} requests a minute: slow down", retry_after=(1.0 - left) / self._per_s
            )
        self._buckets[caller] = (left - 1.0, now)


class Bodies:
    """The request bodies in memory. Used from one event loop."""

    def __init__(self, limit: int):
        self._limit, self._held = limit, 0

    @contextmanager
    def one(self) -> Iterator[Callable[[int], bool]]:
        """Call the result with the size of each piece, which may be kept within the block when there is room."""
        own = 0

        def keep(size: int) -> bool:
            nonlocal own
            if self._held + size > self._limit:
                return False
            own, self._held = own + size, self._held + size
            return True

        try:
            yield keep
        finally:
            self._held -= own


def check_values(body: bytes, limit: int) -> None:
    """Raises BodyTooLarge when a JSON body may hold more values than that: many small ones take the parser long, and a
    multiple of their size in memory."""
    if len(body) > limit and sum(body.count(mark) for mark in (b",", b"[", b"{")) > limit:
        raise BodyTooLarge(f"the body may hold more than {limit} values: send less at a time")
