"""This replica among the others: it tells how it does, and serves the weights that were chosen for all of them.

The choice lies on the broker, and lasts there while a replica serves it; without one, the weights folder's own choice
counts, which replicas share. A set is verified and resident before it counts as this replica's. What keeps it from
being so is this replica's problem, which it tells: it serves what it served before. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
import time
from functools import partial

from generator_service.backends.interface import WeightSet
from generator_service.boundary import guard
from generator_service.engine import Engine
from generator_service.telemetry import Telemetry
from generator_service.weights import WeightStore
from protocol.bus_board import Board
from protocol.errors import NotEverywhere, OnTheFlyError, Retryable, WeightsCorrupt
from protocol.messages import WeightsRef
from protocol.operations import Replica

log = logging.getLogger(__name__)

LOOK_S = 1.0  # between looks at what was chosen, and between announcements
RETRY_S = 30.0  # until damaged weights are looked at again, which reads all of them
POLL_S = 0.1  # between looks at whether all others have followed


class Membership:
    """One replica's place among all. Thread-safe."""

    def __init__(self, name: str, board: Board | None, engine: Engine, telemetry: Telemetry):
        """`name`: unique among the replicas of the broker. `board`: None without a broker."""
        self._name, self._board, self._engine, self._telemetry = name, board, engine, telemetry
        self._started = time.time()
        self._weights: WeightStore | None = None  # None: the model is loading
        self._problem: str | None = None
        self._damaged: tuple[WeightsRef | None, float] | None = None  # the choice that failed; when to look again
        self._changing = threading.Lock()  # held while the active set changes
        self._stopping = False
        self._left = threading.Event()
        self._news = threading.Event()  # something to announce at once
        self._threads = [threading.Thread(target=self._follow_on, name="follow", daemon=True)]
        if board is not None:
            announce = threading.Thread(target=self._announce_on, args=(board,), name="announce", daemon=True)
            self._threads.append(announce)

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def loaded(self, weights: WeightStore) -> None:
        """The model is there, and these are its weights."""
        self._weights = weights

    def stopping(self) -> None:
        """Tell that this replica is about to go."""
        self._stopping = True
        self._news.set()

    def leave(self) -> None:
        """Be no replica any more; the engine must have stopped."""
        self._left.set()
        self._news.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    # ------------------------------------------------------------ activation

    def activate(self, weights: WeightSet) -> None:
        """Verify a set, make it resident between batches, and choose it for all replicas, now and after a restart.

        Raises:
            WeightsCorrupt, NotReady, BrokerUnavailable: nothing was chosen.
        """
        assert self._weights is not None
        with self._changing:
            self._engine.load(weights).result()
            if self._board is not None:
                self._board.choose_weights(weights.ref)
            self._weights.choose(weights)
            self._weights.serve(weights)
            self._telemetry.activated()
            self._problem = self._damaged = None
        self._news.set()

    async def wait_everywhere(self, ref: WeightsRef, timeout_s: float) -> None:
        """Until every live replica serves these weights, or none but those that still load, which will serve them,
        are missing when the time is up. Holds no thread while it waits.

        Raises:
            NotEverywhere: some serve others by then; they are named. They go on trying.
        """
        deadline = time.monotonic() + timeout_s
        while missing := [r for r in await asyncio.to_thread(self.everyone) if r.weights != ref]:
            if time.monotonic() >= deadline or all(r.state == "stopping" for r in missing):
                break
            await asyncio.sleep(POLL_S)
        if laggards := [r for r in missing if r.state == "ready"]:
            told = "; ".join(f"{r.name}: {r.problem or f'it serves {r.weights}'}" for r in laggards)
            raise NotEverywhere(f"{ref} is active, but these replicas do not serve it yet: {told}", retry_after=5.0)

    # ------------------------------------------------------------ looking

    def everyone(self) -> list[Replica]:
        """All replicas of the broker, this one as it is now. Raises BrokerUnavailable."""
        others = [] if self._board is None else [r for r in self._board.replicas() if r.name != self._name]
        return sorted([*others, self.now()], key=lambda replica: replica.name)

    def now(self) -> Replica:
        """How this replica does."""
        weights = self._ready()
        return Replica(
            name=self._name,
            host=socket.gethostname(),
            pid=os.getpid(),
            started=self._started,
            seen=time.time(),
            state="stopping" if self._stopping else "ready" if weights else "loading",
            weights=weights.active().ref if weights else None,
            waiting_rows=sum(self._engine.waiting_rows().values()),
            images=self._telemetry.images,
            busy_s=self._telemetry.busy_s,
            problem=self._problem,
        )

    # ------------------------------------------------------------ threads

    def _ready(self) -> WeightStore | None:
        """The weights, once the engine serves."""
        ready = self._engine.ready
        return self._weights if ready.done() and ready.exception() is None else None

    def _announce_on(self, board: Board) -> None:
        while not self._left.is_set():
            guard(lambda: board.announce(self.now()), _not_told)
            self._news.wait(LOOK_S)
            self._news.clear()
        guard(lambda: board.withdraw(self._name), _not_told)

    def _follow_on(self) -> None:
        while not self._left.wait(LOOK_S):
            if (weights := self._ready()) is not None:
                guard(partial(self._follow, weights), self._fail)

    def _follow(self, weights: WeightStore) -> None:
        """Serve what was chosen, if that is something else."""
        with self._changing:
            ref = self._board.chosen_weights() if self._board is not None else None
            if self._damaged is not None and self._damaged[0] == ref and time.monotonic() < self._damaged[1]:
                return
            try:
                wanted = weights.chosen() if ref is None else weights.pinned(ref)
                if wanted.ref != weights.active().ref:
                    self._engine.load(wanted).result()
                    if self._board is not None and ref is not None and self._board.chosen_weights() == ref:
                        weights.choose(wanted)  # a folder of its own is to agree, also after a restart
                    weights.serve(wanted)
                    self._telemetry.activated()
                    self._news.set()
                    log.info("serving weights that were activated elsewhere", extra={"weights": str(wanted.ref)})
            except WeightsCorrupt:
                self._damaged = (ref, time.monotonic() + RETRY_S)
                raise
            self._problem = self._damaged = None
            if self._board is not None:
                self._board.keep_choice(wanted.ref)

    def _fail(self, error: OnTheFlyError) -> None:
        if isinstance(error, Retryable):  # no answer from the broker, or the engine stops
            return
        if error.message != self._problem:
            log.error("cannot serve the weights that were activated: %s", error.message)
        self._problem = error.message
        self._news.set()


def _not_told(error: OnTheFlyError) -> None:
    log.debug("not announced: %s", error.message)
