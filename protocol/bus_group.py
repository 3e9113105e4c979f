"""One consumer group of one stream: the two ways to get the next entry out of it.

Knows nothing of what entries hold, of leases or of dead letters. Errors of the client library pass through.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import redis

from protocol import bus_scripts
from protocol.broker import MAX_BLOCK_S

Result = TypeVar("Result")


@dataclass(frozen=True)
class Entry:
    """An entry now pending for the consumer that asked."""

    id: str
    body: bytes  # empty when the entry has no field `body`
    deliveries: int  # this one included


class Group:
    """Starts at the stream's first entry; made when it is missing, also after the broker lost it."""

    def __init__(self, client: redis.Redis, stream: str, name: str):
        self.stream = stream
        self.name = name
        self._client = client
        self._claim = client.register_script(bus_scripts.CLAIM)

    def claim(self, consumer: str, idle_s: float, block_s: float) -> Entry | None:
        """Take over an entry that was delivered and neither acked nor renewed for `idle_s` seconds, else the next one
        nobody has had yet; waits `block_s` seconds for that, at most MAX_BLOCK_S. One round trip when there is one."""
        claimed = self._with_group(
            lambda: self._claim(keys=[self.stream], args=[self.name, consumer, int(1000 * idle_s)])
        )
        if claimed is not None:
            entry_id, fields, deliveries = claimed
            return _entry(entry_id, dict(zip(fields[::2], fields[1::2], strict=True)), deliveries)
        block_ms = int(1000 * min(block_s, MAX_BLOCK_S))
        found = self._read(consumer, ">", block_ms) if block_ms else None  # 0 would wait for ever
        return _entry(*found, deliveries=1) if found else None

    def own(self, consumer: str, after: str) -> Entry | None:
        """The next entry pending for this consumer, past the id `after`."""
        found = self._read(consumer, after, None)
        return _entry(*found, deliveries=self._deliveries(found[0])) if found else None

    def pending(self) -> int:
        """How many entries are delivered and not acked."""
        return self._with_group(lambda: self._client.xpending(self.stream, self.name))["pending"]

    def _read(self, consumer: str, after: str, block_ms: int | None) -> tuple[bytes, dict[bytes, bytes]] | None:
        """Id and fields of one entry."""
        reply = self._with_group(
            lambda: self._client.xreadgroup(self.name, consumer, {self.stream: after}, count=1, block=block_ms)
        )
        entries = reply[0][1] if reply else []
        return entries[0] if entries else None

    def _deliveries(self, entry_id: bytes) -> int:
        pending = self._client.xpending_range(self.stream, self.name, entry_id, entry_id, 1)
        return pending[0]["times_delivered"] if pending else 1

    def _with_group(self, call: Callable[[], Result]) -> Result:
        try:
            return call()
        except redis.exceptions.ResponseError as error:
            if not str(error).startswith(("NOGROUP", "UNBLOCKED")):
                raise
        try:
            self._client.xgroup_create(self.stream, self.name, id="0", mkstream=True)
        except redis.exceptions.ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):  # else another process made it meanwhile
                raise
        return call()


def _entry(entry_id: bytes, fields: dict[bytes, bytes], deliveries: int) -> Entry:
    return Entry(entry_id.decode(), fields.get(b"body", b""), deliveries)
