"""The trainer's side of the conversation: feedback goes out over HTTP, batches come in from the queue.

A background thread admits batches into the pool while the loop trains, sends again what could not be sent, and asks
again for answers that cannot be read. Owns staleness: `take(i)` waits for the answers to feedback i - K and hands out
nothing older. While the disk is full nothing is admitted, and the run waits. Knows nothing of models.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from pathlib import Path

from protocol.bus import Bus, Delivery
from protocol.client import GeneratorClient
from protocol.entries import SampleBatch
from protocol.errors import BlobError, BrokerFull, DiskFull, OnTheFlyError, Retryable, WrongIdentity, WrongWeights
from protocol.messages import Feedback, class_source
from trainer import correlation, outage
from trainer.journal import Journal
from trainer.outage import Peers
from trainer.outbox import Outbox
from trainer.pool import Candidate, Pool
from trainer.settings import ServiceConfig

LOOK_S = 1.0  # between looks at whether the broker was restarted
CONSUMER = "trainer"  # its name in the group of the run's batches
ATTEMPTS = 3  # at a unit whose answer cannot be read


class Feed:
    """Feedback out, samples in. Use as a context manager: the background thread lives as long as the block.

    Args:
        staleness: K, in iterations.
        folder: the run's folder.
    """

    def __init__(
        self,
        config: ServiceConfig,
        client: GeneratorClient,
        bus: Bus,
        pool: Pool,
        journal: Journal,
        run: str,
        staleness: int,
        folder: Path,
    ):
        self.pool, self.journal, self.run, self.staleness = pool, journal, run, staleness
        self._config, self._client, self._bus = config, client, bus
        self._peers = Peers(config, journal)
        self._outbox = Outbox(client, pool, self._peers, folder)
        self._failure: Exception | None = None
        self._server, self._next_look = "", 0.0  # the broker's present life, and when to look again
        self._oldest = 0  # feedback whose answers are still of use
        self._stop = threading.Event()
        self._thread = threading.Thread(target=copy_context().run, args=(self._receive,), name="feed", daemon=True)

    def __enter__(self) -> Feed:
        """Raises BrokerUnavailable: a run does not start without its queue."""
        self._server = self._bus.server()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    # ------------------------------------------------------------ out

    def asked(self, iteration: int) -> Feedback | None:
        """The feedback of an iteration, if it was asked before a crash."""
        return self._outbox.asked(iteration)

    def post(self, feedback: Feedback) -> None:
        """Send feedback. When the service cannot take it now, it is sent later, until it would be stale.

        Raises:
            InvalidRequest, NotFound, Unauthorized: the service refuses this feedback for good.
        """
        self._when_there_is_room(lambda: self._outbox.put(feedback))
        self._outbox.send()

    def resume(self, iteration: int) -> None:
        """A run goes on at this iteration: ask again what it still waits for."""
        self._oldest = iteration - self.staleness
        self._outbox.ask_again(self._oldest)

    # ------------------------------------------------------------ in

    def take(self, iteration: int) -> list[Candidate]:
        """Samples for this iteration: waits for the answers to feedback `iteration - K`, then takes what is unused.

        Raises:
            OnTheFlyError: what the background thread could not go on from.
        """
        due = iteration - self.staleness
        self._oldest = due
        for number in self._outbox.give_up(due):
            self.journal.event("unsent", f"feedback {number} was not accepted in time and is stale", feedback=number)
        if self._outbox.asked(due):
            self.wait(due)
        self.journal.dropped(iteration, self.pool.drop_stale(due), "stale")
        return self.pool.take(due)

    def wait(self, due: int) -> None:
        """Until feedback `due` is answered, or it is late, or an outage is not to be waited for.

        Raises:
            OnTheFlyError: what the background thread could not go on from.
        """
        deadline = time.monotonic() + self._config.answer_timeout_s
        next_probe = 0.0
        while not self._outbox.answered(due):
            if self._failure is not None:
                raise self._failure
            now = time.monotonic()
            if now >= next_probe:
                self._probe()
                next_probe = now + 1.0
            if self._peers.declared and self._config.on_outage == "continue":
                return
            if self._peers.failing or self._peers.disk.on:
                deadline = now + self._config.answer_timeout_s  # counts from the recovery
            if now > deadline:
                self.journal.event("late", f"the answers to feedback {due} are late; going on without", feedback=due)
                return
            with self.pool.changed:
                self.pool.changed.wait(0.1)

    def _probe(self) -> None:
        """While waiting: is the service still there?"""
        try:
            self._client.wait_ready(timeout_s=0.0)
        except Retryable as error:
            self._peers.service.failed(error)
        else:
            self._peers.service.succeeded()

    def _receive(self) -> None:
        """The background thread: admit what comes, send what could not be sent. What it cannot go on from is raised in
        the loop's thread."""
        while not self._stop.is_set():
            try:
                self._outbox.send()
                delivery = self._bus.next_batch(self.run, CONSUMER, block_s=0.25)
                self._peers.broker.succeeded()
                self._notice_restart()
                if delivery is not None:
                    with correlation.admitting(delivery.message):
                        self._when_there_is_room(partial(self._admit, delivery))
            except Retryable as error:
                self._bus.interrupted(self.run, CONSUMER)
                peer = self._peers.memory if isinstance(error, BrokerFull) else self._peers.broker
                peer.failed(error)
                self._stop.wait(outage.RETRY_S)
            except Exception as error:
                self._failure = error
                return

    def _notice_restart(self) -> None:
        """A broker that was started anew may have lost what was asked."""
        if time.monotonic() < self._next_look:
            return
        server, self._next_look = self._bus.server(), time.monotonic() + LOOK_S
        if server != self._server:
            self._outbox.ask_again(self._oldest)
        self._server = server

    def _when_there_is_room(self, write: Callable[[], None]) -> None:
        """Try until the disk takes it, or the feed stops. What is not admitted stays on the queue, whose gate then
        holds the generators up."""
        while not self._stop.is_set():
            try:
                write()
            except DiskFull as error:
                self._peers.disk.failed(error)
                self._stop.wait(outage.RETRY_S)
            else:
                self._peers.disk.worked()
                return

    def _admit(self, delivery: Delivery[SampleBatch]) -> None:
        """Make a batch durable, then acknowledge it. Raises DiskFull."""
        batch, data = delivery.message, None
        asked = self._outbox.asked(batch.feedback)
        if asked is None or not batch.unit_id.endswith(asked.fingerprint()):
            self.journal.event("foreign", f"batch {batch.unit_id} answers no question of this run", unit=batch.unit_id)
            self._bus.ack_batch(delivery)
            return
        promised = self._outbox.promised(batch.feedback)
        if batch.samples and promised is not None and batch.weights != promised.weights:
            wrong = WrongWeights(f"it was made with {batch.weights}, and {promised.weights} was promised")
            batch = batch.model_copy(update={"weights": promised.weights})  # to be made with
            self._lost(replace(delivery, message=batch), wrong)
            return
        if stranger := _stranger(batch, asked):
            self._lost(delivery, stranger)
            return
        if batch.blob is not None and not self.pool.answered(batch):
            try:
                data = self._bus.get_blob(batch.blob)
            except BlobError as error:
                self._lost(delivery, error)
                return
        elif batch.error is not None:
            self.journal.event("failed", f"unit {batch.unit_id} failed: {batch.error['detail']}", unit=batch.unit_id)
        if self.pool.admit(batch, data):
            correlation.admitted(batch, self.journal)
        self._bus.ack_batch(delivery)

    def _lost(self, delivery: Delivery[SampleBatch], error: OnTheFlyError) -> None:
        """A batch's pixels cannot be had, or are not those that were promised: its unit is asked for again, and after
        some attempts given up as a dead letter, which an operator may retry."""
        batch = delivery.message
        details = {"unit": batch.unit_id, "attempt": batch.attempt}
        if batch.attempt < ATTEMPTS:
            self.journal.event(error.code, f"batch {batch.unit_id} is lost and asked for again: {error}", **details)
            self._bus.lost.ask_again(delivery)
            return
        missing = [*batch.missing, *(sample.id for sample in batch.samples)]
        failed = {"samples": [], "missing": missing, "blob": None, "init_blob": None}
        self.pool.admit(batch.model_copy(update=failed | {"error": error.to_problem()}), None)
        self.journal.event(error.code, f"batch {batch.unit_id} is lost and given up: {error}", **details)
        self._bus.lost.give_up(delivery, error.to_problem())


def _stranger(batch: SampleBatch, asked: Feedback) -> WrongIdentity | None:
    """What is wrong when a sample is of another class than it was asked for: a sample carries an identity that exists,
    and never a new one."""
    sources = {sample.source_id for sample in batch.samples}
    known = {real.sample_id: (real.label, real.class_name) for real in asked.samples if real.sample_id in sources}
    known |= {class_source(short.class_name): (short.label, short.class_name) for short in asked.classes}
    for sample in batch.samples:
        wanted, found = known.get(sample.source_id or ""), (sample.label, sample.class_name)
        if found != wanted:
            return WrongIdentity(
                f"sample {sample.id} is of class {found[1]!r} (label {found[0]}), and "
                + (f"{wanted[1]!r} (label {wanted[0]}) was asked for" if wanted else "nobody asked for it")
            )
    return None
