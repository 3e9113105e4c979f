"""What lies on the broker for one run, read without taking anything: for whoever looks for what is missing.

Knows nothing of what a run's folder holds, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from pydantic import ValidationError

from protocol import keys
from protocol.broker import broker_errors, connect
from protocol.entries import DeadLetter, SampleBatch, WorkUnit
from protocol.messages import Message

Body = TypeVar("Body", bound=Message)


@dataclass(frozen=True)
class OnBroker:
    """One run's entries. What can be read of none of the types is left out: it is a dead letter, or will be one."""

    units: list[WorkUnit]  # waiting, or in a worker's hands
    batches: list[SampleBatch]  # published, and not acknowledged by the trainer
    dead: list[WorkUnit]  # units that dead letters are about


def on_broker(url: str, run: str) -> OnBroker:
    """Look at the streams, in the order in which entries move: one that moves meanwhile is seen twice, never missed.

    Raises:
        BrokerUnavailable: it does not answer.
    """
    with connect(url) as client, broker_errors(url):

        def bodies(stream: str) -> list[bytes]:
            return [fields.get(b"body", b"") for _, fields in client.xrange(stream)]

        units = list(_read(WorkUnit, bodies(keys.WORK)))
        batches = list(_read(SampleBatch, bodies(keys.batches(run))))
        letters = _read(DeadLetter, bodies(keys.DEAD))
        dead = list(_read(WorkUnit, [letter.entry.encode() for letter in letters if letter.stream == keys.WORK]))
    return OnBroker([unit for unit in units if unit.run == run], batches, [unit for unit in dead if unit.run == run])


def unanswered(url: str, unit_ids: Sequence[str]) -> list[str]:
    """Which of these work units have no answer; a dead letter is one. Raises BrokerUnavailable."""
    if not unit_ids:
        return []
    with connect(url, patient=False) as client, broker_errors(url):
        markers = client.mget([keys.done(unit_id) for unit_id in unit_ids])
    return [unit_id for unit_id, marker in zip(unit_ids, markers, strict=True) if marker is None]


def _read(kind: type[Body], bodies: list[bytes]) -> Iterator[Body]:
    for body in bodies:
        try:
            yield kind.model_validate_json(body)
        except ValidationError:
            continue
