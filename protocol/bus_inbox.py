"""Messages out of a consumer group: entries parsed, and those that cannot be parsed put with the dead letters.

Knows one message type a stream, nothing of what is done with messages. Errors of the client library pass through.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import redis
from pydantic import ValidationError

from protocol import bus_scripts, keys
from protocol.bus_failure import letter
from protocol.bus_group import Entry, Group
from protocol.errors import InvalidRequest
from protocol.messages import Message

Body = TypeVar("Body", bound=Message)
DEAD_LIMIT = 10_000  # dead letters kept, about


@dataclass(frozen=True)
class Delivery(Generic[Body]):
    """One entry in the hands of one consumer."""

    message: Body
    entry_id: str
    stream: str
    deliveries: int  # how often the entry was delivered, this time included
    consumer: str

    @property
    def token(self) -> str:
        """Tells this delivery from every other one of the same entry."""
        return f"{self.consumer}/{self.entry_id}/{self.deliveries}"


class Inbox(Generic[Body]):
    """What the consumers of one group get to read."""

    def __init__(self, client: redis.Redis, group: Group, kind: type[Body]):
        self._client = client
        self._group = group
        self._kind = kind
        self._reject = client.register_script(bus_scripts.REJECT)
        self._own_after: dict[str, str | None] = {}  # consumer -> last own entry read again; None: all of them

    def claim(self, consumer: str, block_s: float, idle_s: float) -> Delivery[Body] | None:
        """A message whose consumer let `idle_s` seconds pass, else a new one, waiting `block_s` seconds for it."""
        while (entry := self._group.claim(consumer, idle_s, block_s)) is not None:
            if (delivery := self._delivery(entry, consumer)) is not None:
                return delivery
        return None

    def resume(self, consumer: str) -> Delivery[Body] | None:
        """The next message that was delivered to this consumer before it, or its connection, broke off."""
        while (after := self._own_after.get(consumer, "0-0")) is not None:
            entry = self._group.own(consumer, after)
            self._own_after[consumer] = entry.id if entry is not None else None
            if entry is not None and (delivery := self._delivery(entry, consumer)) is not None:
                return delivery
        return None

    def interrupted(self, consumer: str) -> None:
        """A reply may be lost, and its entry pending for this consumer: `resume` starts over."""
        self._own_after.pop(consumer, None)

    def peek(self) -> list[tuple[str, Body]]:
        """Entry id and message of all that is on the stream, delivered or not, but for what cannot be parsed."""
        found = []
        for entry_id, fields in self._client.xrange(self._group.stream):
            try:
                found.append((entry_id.decode(), self._kind.model_validate_json(fields.get(b"body", b""))))
            except ValidationError:
                continue  # a dead letter once it is claimed
        return found

    def _delivery(self, entry: Entry, consumer: str) -> Delivery[Body] | None:
        """None when the entry cannot be parsed and is a dead letter now."""
        stream = self._group.stream
        try:
            message = self._kind.model_validate_json(entry.body)
        except ValidationError as error:
            first = error.errors(include_input=False)[0]
            place = ".".join(map(str, first["loc"]))
            problem = InvalidRequest(f"not a {self._kind.__name__}: {place} {first['msg']}", param=place).to_problem()
            dead = letter(stream, entry.body.decode(errors="replace"), entry.deliveries, problem)
            self._reject(
                keys=[stream, keys.DEAD], args=[self._group.name, entry.id, dead.model_dump_json(), DEAD_LIMIT]
            )
            return None
        return Delivery(message, entry.id, stream, entry.deliveries, consumer)
