"""What is told of a work unit while a replica has it: log lines, metrics and a span, all under the ids it came with.

Changes nothing of the unit. Knows nothing of how it is made or published.
"""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from types import TracebackType

from generator_service.batching import Generated
from generator_service.telemetry import Telemetry
from protocol import logs, tracing
from protocol.bus import Delivery
from protocol.entries import WorkUnit
from protocol.errors import OnTheFlyError

log = logging.getLogger("units")


class UnitWatch:
    """One delivery of one unit. A context manager, around all that is done with it."""

    def __init__(self, delivery: Delivery[WorkUnit], telemetry: Telemetry):
        self._delivery, self._telemetry = delivery, telemetry
        self._around = ExitStack()
        self._made = 0.0  # unix seconds

    def __enter__(self) -> UnitWatch:
        unit = self._delivery.message
        about = {"rows": len(unit.rows), "weights": str(unit.weights), "deliveries": self._delivery.deliveries}
        self._around.enter_context(
            logs.fields(run=unit.run, feedback=unit.feedback, unit=unit.id, request_id=unit.request_id)
        )
        self._around.enter_context(tracing.span("unit", parent=unit.traceparent, kind="consumer", **about))
        queued_s = max(0.0, time.time() - int(self._delivery.entry_id.partition("-")[0]) / 1000)  # two clocks
        self._telemetry.unit_claimed(queued_s, self._delivery.deliveries)
        log.info("claimed", extra=about | {"queued_s": round(queued_s, 3)})
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._around.__exit__(kind, error, at)

    def made(self, generated: Generated) -> None:
        """Its images are there."""
        self._made = time.time()
        tracing.record("denoise", generated.started, generated.finished)
        log.info("made", extra={"denoising_s": round(generated.finished - generated.started, 3)})

    def published(self, first: bool) -> None:
        """Its answer is on the queue; not `first`: that of another delivery had been published before."""
        now = time.time()
        tracing.record("publish", self._made, now)
        outcome = "published" if first else "superseded"
        self._telemetry.unit_published(now - self._made)
        self._telemetry.unit_ended(outcome)
        log.info(outcome, extra={"publishing_s": round(now - self._made, 3)})

    def failed(self, error: OnTheFlyError) -> None:
        """It is given up for good."""
        self._telemetry.unit_ended("failed")
        tracing.describe(error=error.message)
        log.error("failed: %s", error.message, extra={"error": error.code})

    def released(self, error: OnTheFlyError, *, lease_lost: bool) -> None:
        """It is left to others."""
        self._telemetry.unit_ended("lease_lost" if lease_lost else "released")
        tracing.describe(released=error.message)
        log.info("released: %s", error.message, extra={"reason": error.code, "lease_lost": lease_lost})
