"""Answers that were published and cannot be read any more: their units are asked for again, or given up.

Both happen in one step with taking the answer off the queue. A unit is made anew from what its answer says of each
sample. Knows nothing of who finds out that an answer cannot be read, nor how.
"""

from __future__ import annotations

from typing import Any

import redis

from protocol import bus_scripts, keys
from protocol.broker import broker_errors
from protocol.bus_blobs import BlobStore
from protocol.bus_failure import letter
from protocol.bus_inbox import DEAD_LIMIT, Delivery
from protocol.entries import SampleBatch, WorkRow, WorkUnit


class LostAnswers:
    """The training side's remedy for a batch whose blob is gone. Raises BrokerUnavailable when there is no answer."""

    def __init__(self, client: redis.Redis, blobs: BlobStore, url: str):
        self._blobs, self._url = blobs, url
        self._replace = client.register_script(bus_scripts.REPLACE_BATCH)

    def ask_again(self, delivery: Delivery[SampleBatch]) -> None:
        """Put the batch's work unit on the queue in the batch's place, as its next attempt."""
        unit = unit_of(delivery.message)
        again = unit.model_copy(update={"attempt": unit.attempt + 1})
        self._take_off(delivery, unit.id, keys.WORK, again.model_dump_json())

    def give_up(self, delivery: Delivery[SampleBatch], problem: dict[str, Any]) -> None:
        """Put a dead letter about the batch's work unit in the batch's place."""
        unit = unit_of(delivery.message)
        dead = letter(keys.WORK, unit.model_dump_json(), delivery.deliveries, problem)
        self._take_off(delivery, unit.id, keys.DEAD, dead.model_dump_json())

    def _take_off(self, delivery: Delivery[SampleBatch], unit_id: str, onto: str, body: str) -> None:
        blob = delivery.message.blob
        with broker_errors(self._url):
            self._replace(
                keys=[delivery.stream, keys.done(unit_id), onto, self._blobs.key(blob)],
                args=[keys.BATCH_GROUP, delivery.entry_id, body, DEAD_LIMIT if onto == keys.DEAD else ""],
            )
        self._blobs.drop_file(blob)


def unit_of(batch: SampleBatch) -> WorkUnit:
    """The work unit that a batch with samples answers; its prompts are final."""
    first = batch.samples[0]
    same = WorkRow.model_fields.keys() - {"sample_id", "caption"}
    rows = [
        WorkRow.model_validate({"sample_id": sample.id} | {name: getattr(sample, name) for name in same})
        for sample in batch.samples
    ]
    return WorkUnit.model_validate(
        {
            "id": batch.unit_id,
            "run": batch.run,
            "feedback": batch.feedback,
            "unit": batch.unit,
            "units": batch.units,
            "model_version": batch.model_version,
            "weights": batch.weights,
            "steps": first.steps,
            "scheduler": first.scheduler,
            "strength": first.strength,
            "lora_scale": first.lora_scale,
            "rows": rows,
            "init_blob": batch.init_blob,
            "attempt": batch.attempt,
            "missing": batch.missing,
            "request_id": batch.request_id,
            "traceparent": batch.traceparent,
        }
    )
