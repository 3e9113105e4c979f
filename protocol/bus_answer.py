"""Answers to work units: each is staged, published and acknowledged in one round trip.

Knows nothing of what a batch holds, nor of how an answer is read. Errors of the client library pass through: `Bus`
translates them.
"""

from __future__ import annotations

from typing import Any

import redis

from protocol import bus_scripts, keys, tracing
from protocol.bus_blobs import BlobStore
from protocol.bus_inbox import DEAD_LIMIT, Delivery
from protocol.entries import BlobRef, DeadLetter, SampleBatch, WorkUnit
from protocol.errors import BrokerUnavailable


class Answers:
    """The one way in which a unit's answer gets on its run's stream."""

    def __init__(self, client: redis.Redis, blobs: BlobStore, blob_ttl_s: int):
        self._client, self._blobs, self._blob_ttl_s = client, blobs, blob_ttl_s
        self._script = client.register_script(bus_scripts.ANSWER_UNIT)

    def publish(
        self, delivery: Delivery[WorkUnit], batch: SampleBatch, data: bytes | None, dead: DeadLetter | None
    ) -> bool:
        """Arguments, result and errors as of `Bus.finish_work`; `dead`: a letter to keep about the unit."""
        unit = delivery.message
        assert (batch.unit_id, batch.run) == (unit.id, unit.run), (batch.unit_id, unit.id)
        ref = None if data is None else self._blobs.ref(unit.id, data)
        filled = {"blob": ref, "init_blob": unit.init_blob if dead is None else None, "attempt": unit.attempt}
        filled |= {"request_id": unit.request_id, "traceparent": tracing.traceparent() or unit.traceparent}
        arguments = [
            delivery.token,
            keys.MARKER_TTL_S,
            keys.WORK_GROUP,
            delivery.entry_id,
            batch.model_copy(update=filled).model_dump_json(),
            self._blob_ttl_s,
            dead.model_dump_json() if dead is not None else "",
            DEAD_LIMIT,
        ]
        published = self._send(delivery, ref, data, arguments)
        if published < 0:
            raise BrokerUnavailable(f"the broker lost the blob of unit {unit.id} before it was published: try again")
        return bool(published)

    def _send(self, delivery: Delivery[WorkUnit], ref: BlobRef | None, data: bytes | None, arguments: list[Any]) -> int:
        """What the script says. It goes out with the blob, and finds that written: the broker keeps their order."""
        unit = delivery.message
        pipeline = self._client.pipeline(transaction=False)
        staged = self._blobs.stage(ref, data, delivery.token, pipeline)
        places = [keys.done(unit.id), delivery.stream, keys.batches(unit.run), keys.DEAD, self._blobs.key(ref), staged]
        pipeline.evalsha(self._script.sha, len(places), *places, *arguments)
        for reply in (replies := pipeline.execute(raise_on_error=False)):
            if isinstance(reply, redis.exceptions.NoScriptError):  # the broker is new; the blob is staged
                return self._script(keys=places, args=arguments)
            if isinstance(reply, Exception):
                raise reply
        return replies[-1]
