"""What is said of work that failed for good: the answer without samples, the dead letter, and why.

Builds messages and writes nothing.
"""

from __future__ import annotations

import time
from typing import Any

from protocol.entries import DeadLetter, SampleBatch, WorkUnit
from protocol.errors import GenerationFailed


def failed_batch(unit: WorkUnit, worker: str, problem: dict[str, Any]) -> SampleBatch:
    """The answer to a unit that has no samples but the problem."""
    now = time.time()
    return SampleBatch(
        unit_id=unit.id,
        run=unit.run,
        feedback=unit.feedback,
        unit=unit.unit,
        units=unit.units,
        model_version=unit.model_version,
        weights=unit.weights,
        samples=[],
        missing=[*unit.missing, *(row.sample_id for row in unit.rows)],
        blob=None,
        error=problem,
        worker=worker,
        started=now,
        finished=now,
    )


def letter(stream: str, entry: str, deliveries: int, problem: dict[str, Any]) -> DeadLetter:
    """A dead letter of this moment; `entry` is the entry's body as it was."""
    return DeadLetter(stream=stream, entry=entry, deliveries=deliveries, problem=problem, time=time.time())


def worn_out(unit: WorkUnit, deliveries: int) -> GenerationFailed:
    """Why a unit is given up that was delivered `deliveries` times and never answered."""
    return GenerationFailed(
        f"work unit {unit.id} was delivered {deliveries} times and never finished: its workers died or lost their "
        "leases. See their logs; broker.lease_idle_s may be too short"
    )
