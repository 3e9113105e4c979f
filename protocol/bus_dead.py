"""Dead letters, for operators: look at them, put their units back to work, or throw them away.

Knows nothing of how an entry became a dead letter (`bus`, `bus_inbox`, `bus_lost`). Every method raises
BrokerUnavailable when the broker does not answer.
"""

from __future__ import annotations

import redis
from pydantic import ValidationError

from protocol import bus_scripts, keys
from protocol.broker import broker_errors
from protocol.bus_blobs import BlobStore
from protocol.entries import DeadLetter, WorkUnit
from protocol.errors import BlobMissing, Conflict, InvalidRequest, QueueFull, UnknownDeadLetter
from protocol.operations import DeadLetterInfo, DeadLetterList, DeadLetterOutcome


class DeadLetters:
    """The stream `dead`. May be shared by threads."""

    def __init__(self, client: redis.Redis, blobs: BlobStore, url: str, work_gate: int, blob_ttl_s: int):
        self._client, self._blobs, self._url = client, blobs, url
        self._work_gate, self._blob_ttl_s = work_gate, blob_ttl_s
        self._retry = client.register_script(bus_scripts.RETRY_DEAD)

    def newest(self, limit: int = 100, before: str | None = None) -> DeadLetterList:
        """The newest dead letters, newest first; `before`: only those older than the one of this id."""
        with broker_errors(self._url):
            total = self._client.xlen(keys.DEAD)
            if before is not None and not any(map(int, before.split("-"))):
                return DeadLetterList(total=total, data=[])  # the server refuses to look before 0-0
            found = self._client.xrevrange(keys.DEAD, f"({before}" if before else "+", "-", count=limit)
        return DeadLetterList(total=total, data=[_info(entry_id.decode(), fields) for entry_id, fields in found])

    def retry(self, letter_id: str) -> DeadLetterOutcome:
        """Put the unit of a dead letter on the queue anew, as if it had never been tried. Its run takes the answer in
        the place of the failure.

        Raises:
            UnknownDeadLetter: it was retried or dropped before.
            Conflict: what it holds cannot be read as a work unit.
            BlobMissing: the unit's init images are gone.
            QueueFull: the work queue is at its gate, or the broker is out of memory.
        """
        unit = _unit(self._find(letter_id).letter)
        if unit is None:
            raise Conflict(f"dead letter {letter_id} holds no work unit that can be read: drop it")
        gone = BlobMissing(
            f"the init images of unit {unit.id} are gone ({unit.init_blob and unit.init_blob.ref}), and only its "
            "trainer has them: drop the dead letter"
        )
        if not self._blobs.keep_file(unit.init_blob):
            raise gone
        blob, anew = self._blobs.key(unit.init_blob), unit.model_copy(update={"attempt": 1})
        with broker_errors(self._url):
            outcome = self._retry(
                keys=[keys.DEAD, keys.done(unit.id), keys.WORK, blob],
                args=[letter_id, anew.model_dump_json(), self._work_gate, self._blob_ttl_s if blob else ""],
            )
        if outcome == b"unknown":
            raise _unknown(letter_id)
        if outcome == b"blob missing":
            raise gone
        if outcome == b"full":
            raise QueueFull(f"work units fill the queue (broker.work_gate = {self._work_gate}): try again later")
        return DeadLetterOutcome(id=letter_id, done="retried", details={"unit_id": unit.id})

    def drop(self, letter_id: str) -> DeadLetterOutcome:
        """Remove a dead letter, and the init images of its unit. Raises UnknownDeadLetter."""
        found = self._find(letter_id)
        with broker_errors(self._url):
            if not self._client.xdel(keys.DEAD, letter_id):  # retried meanwhile, with its init images
                raise _unknown(letter_id)
            if (unit := _unit(found.letter)) is not None:
                self._blobs.drop(unit.init_blob)
        return DeadLetterOutcome(id=letter_id, done="dropped", details={"unit_id": found.unit_id})

    def forget(self, run: str) -> None:
        """Drop a run's dead letters."""
        with broker_errors(self._url):
            for entry_id, fields in self._client.xrange(keys.DEAD):
                info = _info(entry_id.decode(), fields)
                if info.run == run and self._client.xdel(keys.DEAD, info.id) and (unit := _unit(info.letter)):
                    self._blobs.drop(unit.init_blob)

    def _find(self, letter_id: str) -> DeadLetterInfo:
        with broker_errors(self._url):
            found = self._client.xrange(keys.DEAD, letter_id, letter_id)
        if not found:
            raise _unknown(letter_id)
        return _info(letter_id, found[0][1])


def _info(entry_id: str, fields: dict[bytes, bytes]) -> DeadLetterInfo:
    body = fields.get(b"body", b"")
    try:
        letter = DeadLetter.model_validate_json(body)
    except ValidationError:
        problem = InvalidRequest("not a dead letter of this version: drop it").to_problem()
        text = body.decode(errors="replace")
        letter = DeadLetter(
            stream=keys.DEAD, entry=text, deliveries=0, problem=problem, time=int(entry_id.partition("-")[0]) / 1000
        )
    unit = _unit(letter)
    if unit is None:
        return DeadLetterInfo(id=entry_id, letter=letter, unit_id=None, run=None, feedback=None)
    return DeadLetterInfo(id=entry_id, letter=letter, unit_id=unit.id, run=unit.run, feedback=unit.feedback)


def _unit(letter: DeadLetter) -> WorkUnit | None:
    """None when the letter is about something else, or its entry cannot be read."""
    try:
        return WorkUnit.model_validate_json(letter.entry) if letter.stream == keys.WORK else None
    except ValidationError:
        return None


def _unknown(letter_id: str) -> UnknownDeadLetter:
    return UnknownDeadLetter(f"no dead letter {letter_id}: it was retried or dropped already, or there was none")
