"""The ids under which the trainer's log lines and spans tell of a feedback and of the batches that answer it: the same
that those of the generator service have.

Knows nothing of how either travels.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from protocol import logs, tracing
from protocol.entries import SampleBatch
from protocol.messages import Feedback
from trainer.journal import Journal

log = logging.getLogger("units")


@contextmanager
def sending(feedback: Feedback) -> Iterator[None]:
    """Around one attempt at sending feedback, whose HTTP request gets the id that follows from run and iteration."""
    about = {"feedback": feedback.feedback, "request_id": f"{feedback.run}.{feedback.feedback}"}
    with logs.fields(**about), tracing.span("feedback", kind="client"):
        yield


@contextmanager
def admitting(batch: SampleBatch) -> Iterator[None]:
    """Around all that is done with a batch that came."""
    about = {"feedback": batch.feedback, "unit": batch.unit_id, "request_id": batch.request_id}
    with logs.fields(**about), tracing.span("admit", parent=batch.traceparent, kind="consumer"):
        yield


def admitted(batch: SampleBatch, journal: Journal) -> None:
    """A batch that counts is in the run's folder."""
    journal.interval("generator", "generate", batch.started, batch.finished, feedback=batch.feedback, unit=batch.unit)
    log.info("admitted", extra={"samples": len(batch.samples), "worker": batch.worker})
