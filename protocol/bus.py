"""The work and batch streams: publish, claim, renew, finish, admit, with dead letters and backpressure.

Delivery is at least once, and each work unit has one published answer (DESIGN: delivery, leases, backpressure,
payloads). Knows nothing of how images are made or used, nor of HTTP. Every method raises BrokerUnavailable when the
broker does not answer, and works again once it does; a Bus may be shared by threads, a consumer's name may not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import redis
from pydantic import BaseModel, ConfigDict, Field

from protocol import bus_scripts, keys
from protocol.broker import BrokerConfig, broker_errors, connect
from protocol.bus_answer import Answers
from protocol.bus_blobs import BlobStore
from protocol.bus_board import Board
from protocol.bus_captions import CaptionStore
from protocol.bus_dead import DeadLetters
from protocol.bus_failure import failed_batch, letter, worn_out
from protocol.bus_forget import forget
from protocol.bus_group import Group
from protocol.bus_inbox import Delivery, Inbox
from protocol.bus_lease import Lease
from protocol.bus_lost import LostAnswers
from protocol.entries import BlobRef, SampleBatch, WorkUnit
from protocol.errors import IdempotencyConflict, QueueFull
from protocol.messages import FeedbackAccepted


class BusConfig(BaseModel):
    """How the queue behaves. All processes of a run must agree on it."""

    model_config = ConfigDict(extra="forbid")

    lease_idle_s: float = Field(default=30.0, gt=0.0, le=3600.0)  # seconds unrenewed until others take work over
    max_deliveries: int = Field(default=5, ge=1, le=1000)  # a unit delivered more often is a dead letter
    work_gate: int = Field(default=1000, ge=1)  # units waiting or in work; feedback past it is answered "queue full"
    batch_gate: int = Field(default=64, ge=1)  # batches a run has not taken in yet; at it, its units are put off
    blob_ttl_s: int = Field(default=keys.BLOB_TTL_S, ge=1)  # seconds; life of a blob nobody drops
    blob_dir: Path | None = None  # folder shared by all processes, for blobs; None: they lie on the broker


class QueueConfig(BrokerConfig, BusConfig):
    """The table [broker] of a run's settings: where the broker is, and how the queue on it behaves."""


class Bus:
    """One process's access to the queue."""

    def __init__(self, url: str, config: BusConfig, *, patient: bool = True):
        """Connects on first use; `patient` as in `connect`. Raises ConfigError for a URL that does not parse."""
        self.config = config
        self._url = url
        self._client = connect(url, patient=patient)
        self._blobs = BlobStore(self._client, config.blob_dir, config.blob_ttl_s)
        self._work = Group(self._client, keys.WORK, keys.WORK_GROUP)
        self._publish_plan = self._client.register_script(bus_scripts.PUBLISH_PLAN)
        self._answers = Answers(self._client, self._blobs, config.blob_ttl_s)
        self._ack_batch = self._client.register_script(bus_scripts.ACK_BATCH)
        self._renew = self._client.register_script(bus_scripts.RENEW)
        self._release = self._client.register_script(bus_scripts.RELEASE)
        self._put_back = self._client.register_script(bus_scripts.PUT_BACK)
        self._work_inbox = Inbox(self._client, self._work, WorkUnit)
        self._batch_inboxes: dict[str, Inbox[SampleBatch]] = {}  # one a run
        self.dead = DeadLetters(self._client, self._blobs, url, config.work_gate, config.blob_ttl_s)
        self.board = Board(self._client, url)
        self.lost = LostAnswers(self._client, self._blobs, url)
        self.captions = CaptionStore(self._client, url)

    def close(self) -> None:
        self._client.close()

    # ------------------------------------------------------------ planning side

    def publish_plan(
        self,
        run: str,
        feedback: int,
        fingerprint: str,
        units: Sequence[WorkUnit],
        blobs: Mapping[str, bytes],
        reply: FeedbackAccepted,
    ) -> FeedbackAccepted:
        """Put a planned feedback on the queue: marker, blobs and all units, or nothing.

        Args:
            fingerprint: of the feedback's body; the same one again publishes nothing and returns the first reply.
            blobs: blob id -> bytes, of the units' init blobs, which `blob_ref` named.

        Raises:
            IdempotencyConflict: this feedback was planned with another fingerprint.
            QueueFull: the units do not fit under `work_gate`. BrokerFull: the broker is out of memory.
            DiskFull: the folder of blobs has no room for the units' init images.
        """
        refs = {blob_id: self.blob_ref(blob_id, data) for blob_id, data in blobs.items()}
        for blob_id, ref in refs.items():
            self._blobs.put_file(ref, blobs[blob_id])
        inline = {key: blobs[blob_id] for blob_id, ref in refs.items() if (key := self._blobs.key(ref))}
        settings = [keys.MARKER_TTL_S, self.config.work_gate, self.config.blob_ttl_s, keys.BATCH_GROUP, len(inline)]
        with broker_errors(self._url):
            outcome, *rest = self._publish_plan(
                keys=[keys.plan(run, feedback), keys.WORK, keys.batches(run), *inline],
                args=[
                    fingerprint,
                    reply.model_dump_json(),
                    *settings,
                    *inline.values(),
                    *(unit.model_dump_json() for unit in units),
                ],
            )
        if outcome == b"full":
            raise QueueFull(
                f"{rest[0]} work units are waiting and {len(units)} more do not fit under broker.work_gate = "
                f"{self.config.work_gate}: send the feedback again later, or add generator replicas"
            )
        if outcome == b"published":
            return reply
        if rest[0].decode() != fingerprint:
            raise IdempotencyConflict(
                f"feedback {feedback} of run {run!r} was accepted before with another body: resume the run from its "
                "checkpoint, or give this run another name"
            )
        return FeedbackAccepted.model_validate_json(rest[1])

    # ------------------------------------------------------------ blobs

    def blob_ref(self, blob_id: str, data: bytes) -> BlobRef:
        """The reference that `data` will have as this blob; writes nothing."""
        return self._blobs.ref(blob_id, data)

    def put_blob(self, data: bytes, *, blob_id: str) -> BlobRef:
        """Write bytes for others to fetch. Raises BrokerFull, or DiskFull for a blob of the shared folder."""
        ref = self.blob_ref(blob_id, data)
        with broker_errors(self._url):
            self._blobs.put(ref, data)
        return ref

    def get_blob(self, ref: BlobRef) -> bytes:
        """The bytes of a blob. Raises BlobMissing, or BlobCorrupt when size or sha256 differ."""
        with broker_errors(self._url):
            return self._blobs.get(ref)

    def drop_blob(self, ref: BlobRef | None) -> None:
        """Remove a blob; one that is gone already is fine."""
        with broker_errors(self._url):
            self._blobs.drop(ref)

    # ------------------------------------------------------------ working side

    def claim_work(self, consumer: str, block_s: float = 1.0) -> Delivery[WorkUnit] | None:
        """The next work unit: first one whose worker died, else a new one; None when `block_s` seconds bring none.

        What was delivered too often or cannot be parsed goes to the dead letters on the way.
        """
        while True:
            with broker_errors(self._url):
                delivery = self._work_inbox.claim(consumer, block_s, self.config.lease_idle_s)
            if delivery is None or delivery.deliveries <= self.config.max_deliveries:
                return delivery
            self.fail_work(delivery, worn_out(delivery.message, delivery.deliveries - 1).to_problem())

    def lease(self, delivery: Delivery[Any]) -> Lease:
        """Keeps the claim while its body runs, renewing at a third of the idle limit; `.lost` tells when it is gone."""
        return Lease(lambda: self.renew(delivery), self.config.lease_idle_s / 3, delivery.entry_id)

    def renew(self, delivery: Delivery[Any]) -> bool:
        """Start the idle limit anew. False when the entry is in other hands, or answered."""
        with broker_errors(self._url):
            return bool(self._renew(keys=[delivery.stream], args=_held(delivery)))

    def release(self, delivery: Delivery[WorkUnit]) -> None:
        """Give up a unit that is not answered: another worker may take it at once, and this delivery does not count.
        Without effect when it is in other hands already."""
        with broker_errors(self._url):
            self._release(keys=[delivery.stream], args=_held(delivery))

    def put_back_if_gated(self, delivery: Delivery[WorkUnit]) -> bool:
        """Put a unit behind all others while its run has `batch_gate` batches it has not taken in, so that a run that
        nobody reads keeps no worker from the others. False when the unit is to be made now; True when it is not this
        delivery's any more: it was put back, with its deliveries counted anew, or had been lost before."""
        streams = [delivery.stream, keys.batches(delivery.message.run)]
        with broker_errors(self._url):
            return bool(self._put_back(keys=streams, args=[*_held(delivery), self.config.batch_gate]))

    def finish_work(self, delivery: Delivery[WorkUnit], batch: SampleBatch, data: bytes | None) -> bool:
        """Answer a work unit: marker, blob, batch and ack in one step.

        Args:
            batch: its `blob` is filled in here, from `data`; what it only hands on from its unit, too.

        Returns:
            True when this is the published answer; False when another delivery of the unit was answered before, or
            the unit is not on the queue any more.

        Raises:
            BrokerFull, DiskFull: no room for the batch; nothing happened, call again.
        """
        with broker_errors(self._url):
            return self._answers.publish(delivery, batch, data, dead=None)

    def fail_work(self, delivery: Delivery[WorkUnit], problem: dict[str, Any]) -> bool:
        """Answer a work unit with a batch that has no samples but the problem, so that nobody waits for it, and keep
        a dead letter, with the init images. Returns and raises as `finish_work`."""
        unit = delivery.message
        batch = failed_batch(unit, delivery.consumer, problem)
        dead = letter(delivery.stream, unit.model_dump_json(), delivery.deliveries, problem)
        with broker_errors(self._url):
            return self._answers.publish(delivery, batch, None, dead)

    # ------------------------------------------------------------ training side

    def next_batch(self, run: str, consumer: str, block_s: float = 1.0) -> Delivery[SampleBatch] | None:
        """The next answer of a run: first what this consumer had before it was interrupted, then what another left
        behind, then a new one; None when `block_s` seconds bring none. Ack it once it is durable.
        Raises BrokerFull when nothing of the run was planned yet and the broker is out of memory."""
        inbox = self._batch_inbox(run)
        with broker_errors(self._url):
            try:
                return inbox.resume(consumer) or inbox.claim(consumer, block_s, self.config.lease_idle_s)
            except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError):
                inbox.interrupted(consumer)
                raise

    def interrupted(self, run: str, consumer: str) -> None:
        """Something failed while this consumer had an answer in hand: what it did not ack comes again, at once."""
        self._batch_inbox(run).interrupted(consumer)

    def forget_run(self, run: str) -> None:
        """Take what an earlier run of this name asked, its answers and its dead letters off the broker."""
        with broker_errors(self._url):
            forget(run, self._client, self._blobs, self._work_inbox, self._batch_inbox(run))
        self.dead.forget(run)
        self.board.forget(run)
        self._batch_inboxes.pop(run, None)

    def ack_batch(self, delivery: Delivery[SampleBatch]) -> None:
        """Take an admitted batch and its blobs off the queue, in one step."""
        blobs = (delivery.message.blob, delivery.message.init_blob)
        with broker_errors(self._url):
            places = [delivery.stream, *map(self._blobs.key, blobs)]
            self._ack_batch(keys=places, args=[keys.BATCH_GROUP, delivery.entry_id])
        for blob in blobs:
            self._blobs.drop_file(blob)

    # ------------------------------------------------------------ what is where

    def batches_waiting(self, run: str) -> int:
        """Batches of a run that are not acked."""
        with broker_errors(self._url):
            return self._client.xlen(keys.batches(run))

    def server(self) -> str:
        """Id of the broker's present life: another one after a restart, when data may be lost."""
        with broker_errors(self._url):
            return self._client.info("server")["run_id"]

    def depths(self) -> dict[str, int]:
        """Work units `waiting` and `in_work`, and `dead` letters."""
        with broker_errors(self._url):
            in_work = self._work.pending()
            waiting = self._client.xlen(keys.WORK) - in_work
            return {"waiting": max(0, waiting), "in_work": in_work, "dead": self._client.xlen(keys.DEAD)}

    # ------------------------------------------------------------ inside

    def _batch_inbox(self, run: str) -> Inbox[SampleBatch]:
        if run not in self._batch_inboxes:
            group = Group(self._client, keys.batches(run), keys.BATCH_GROUP)
            self._batch_inboxes[run] = Inbox(self._client, group, SampleBatch)
        return self._batch_inboxes[run]


def _held(delivery: Delivery[Any]) -> list[str | int]:
    """What tells a script whether a unit is still this delivery's."""
    return [keys.WORK_GROUP, delivery.entry_id, delivery.consumer, delivery.deliveries]
