"""The one compute worker: a thread that owns the backend and is the only one to touch it.

It takes turns between merged requests, queued work units, adaptation steps and hot swaps. After each batch at least one
optimiser step of a running adaptation, after each optimiser step waiting generation first, so that neither starves.
Knows nothing of HTTP, of the broker or of image files: callers give rows and get a future of arrays; encoding and
publishing them is done elsewhere, while the next batch is denoised.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import numpy as np

from generator_service.adaptation_run import AdaptationRun
from generator_service.backends.interface import Backend, Row, Sampling, WeightSet
from generator_service.batching import Batch, Batcher, Generated, Generation
from generator_service.boundary import guard
from protocol.errors import Cancelled, NotReady, OnTheFlyError

log = logging.getLogger(__name__)
STOPPED = "the service is shutting down: try another replica"


class EngineMetrics(Protocol):
    """What the engine reports of its work."""

    def batch_done(self, batch: Batch, started: float, finished: float) -> None: ...

    def adaptation_step(self, loss: float) -> None: ...


class Engine:
    """Serves generations and adaptations from one thread; every method may be called from any other."""

    def __init__(
        self,
        prepare: Callable[[], tuple[Backend, WeightSet]],
        verify: Callable[[WeightSet], None],
        metrics: EngineMetrics,
        *,
        max_batch: int,
        window_s: float,
        max_waiting_rows: int,
        max_own_rows: int | None = None,
    ):
        """
        Args:
            prepare: builds the backend and tells the active weight set; called on the compute thread.
            verify: raises WeightsCorrupt when a set's files are not what they should be; once for each set.
            max_batch: rows in a merged batch.
            window_s: how long a batch that is not full waits for more rows.
            max_waiting_rows: rows of requests that may wait; more raise QueueFull.
            max_own_rows: of them, rows of one owner; None: all.
        """
        self._prepare, self._verify, self._metrics = prepare, verify, metrics
        self._max_waiting_rows = max_waiting_rows
        self._max_own_rows = max_waiting_rows if max_own_rows is None else max_own_rows
        self._batcher = Batcher(max_batch, window_s)
        self._adaptations: deque[AdaptationRun] = deque()
        self._loads: deque[tuple[WeightSet, Future[None]]] = deque()
        self._running: list[Generation] = []
        self._owes_step = False  # a batch ran since the last optimiser step
        self._verified: set[str] = set()
        self._stopping = False
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)
        self.ready: Future[None] = Future()  # a real forward pass succeeded, or why not

    # ------------------------------------------------------------ called by others

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Finish the current batch or optimiser step, end the thread, and fail what waits with NotReady."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def check_ready(self) -> None:
        """Raises NotReady until a real forward pass succeeded, and while shutting down."""
        if self._stopping:
            raise NotReady(STOPPED)
        if not self.ready.done():
            raise NotReady("the model is loading: try again in a moment")
        if error := self.ready.exception():
            raise NotReady(f"the model could not be loaded: {error}", retry_after=60.0)

    @contextmanager
    def _accepting(self) -> Iterator[None]:
        with self._wake:  # so that nothing is added after the last look
            self.check_ready()
            yield

    def submit(self, generation: Generation) -> Future[Generated]:
        """Queue rows. Raises QueueFull (requests only: work units are bounded by who feeds them) and NotReady."""
        with self._accepting():
            if generation.lane == "request":
                self._batcher.check_room(generation, self._max_waiting_rows, self._max_own_rows)
            self._batcher.add(generation, time.monotonic())
            self._wake.notify()
        return generation.future

    def cancel(self, generation: Generation) -> None:
        """Drop a generation: at once when it waits, after the current denoising step when it runs."""
        with self._wake:
            generation.cancelled = True
            self._batcher.remove(generation)
            running = generation in self._running
        if not running:
            self._settle(generation, _cancelled())

    def adapt(self, run: AdaptationRun) -> Future[tuple[str, dict[str, Any]]]:
        """Queue an adaptation; they run one after another. Raises NotReady."""
        with self._accepting():
            self._adaptations.append(run)
            self._wake.notify()
        return run.future

    def cancel_adaptation(self, run: AdaptationRun) -> None:
        """Stop an adaptation after its current optimiser step."""
        with self._wake:
            run.cancelled = True
            self._wake.notify()

    def load(self, weights: WeightSet) -> Future[None]:
        """Verify a weight set and make it resident, between batches. The future may raise WeightsCorrupt."""
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()
        with self._accepting():
            self._loads.append((weights, future))
            self._wake.notify()
        return future

    def waiting_rows(self) -> dict[str, int]:
        """Rows that wait in each lane."""
        with self._wake:
            return {lane: self._batcher.waiting_rows(lane) for lane in ("request", "queue")}

    # ------------------------------------------------------------ compute thread

    def _run(self) -> None:
        guard(self._warm_up, self.ready.set_exception)
        while (action := self._next()) is not None:
            action()
        stopped = NotReady(STOPPED)
        with self._wake:
            generations, adaptations, loads = self._batcher.drain(), tuple(self._adaptations), tuple(self._loads)
        for generation in generations:
            self._settle(generation, stopped)
        for run in adaptations:
            self._end(run, stopped)
        for _, future in loads:
            future.set_exception(stopped)

    def _next(self) -> Callable[[], None] | None:
        """Wait for work and choose; None: stop."""
        with self._wake:
            while not self._stopping:
                if self._loads:
                    weights, future = self._loads.popleft()
                    return partial(guard, partial(self._swap, weights, future), future.set_exception)
                now = time.monotonic()
                owes_step = self._owes_step and self._adaptations
                if not owes_step and (batch := self._batcher.take(now)):
                    self._owes_step = True
                    self._running = batch.generations
                    return partial(guard, partial(self._denoise, batch), partial(self._fail, batch), batch.about)
                if self._adaptations:
                    self._owes_step = False
                    run = next((run for run in self._adaptations if run.cancelled), self._adaptations[0])
                    return partial(guard, partial(self._step, run), partial(self._end, run))
                due = self._batcher.due()
                self._wake.wait(None if due is None else due - now)
        return None

    def _warm_up(self) -> None:
        self._backend, weights = self._prepare()
        self._make_resident(weights)
        row, sampling = Row(seed=0, label=0 if weights.classes else None), Sampling(steps=1, scheduler="ddim")
        if self._backend.can.makes == "clip":
            black = np.zeros((*self._backend.native_size(), 3), dtype=np.uint8)
            row, sampling = replace(row, image=black), replace(sampling, frames=2)
        self._backend.generate(weights, [row], sampling)
        self.ready.set_result(None)
        log.info("ready", extra={"weights": str(weights.ref)})

    def _make_resident(self, weights: WeightSet) -> None:
        if weights.ref.digest not in self._verified:
            self._verify(weights)
            self._verified.add(weights.ref.digest)
        self._backend.load(weights)

    def _swap(self, weights: WeightSet, future: Future[None]) -> None:
        self._verified.discard(weights.ref.digest)
        self._make_resident(weights)
        future.set_result(None)

    def _denoise(self, batch: Batch) -> None:
        from generator_service import out_of_memory  # late: it imports torch

        lead = batch.generations[0]
        started = time.time()
        self._make_resident(lead.weights)
        rows = self._backend.chosen(lead.weights, batch.rows, lead.sampling)
        on_step = partial(self._after_step, batch)
        images = out_of_memory.generate(self._backend, lead.weights, rows, lead.sampling, on_step)
        finished = time.time()
        assert len(images) == len(rows), f"{len(images)} images for {len(rows)} rows"
        self._metrics.batch_done(batch, started, finished)
        with self._wake:
            self._running = []
            self._batcher.batch_ended(time.monotonic())
        offset = 0
        for generation, part in batch.parts:
            size = part.stop - part.start
            generation.images.append(images[offset : offset + size])
            generation.made += rows[offset : offset + size]
            generation.started = started if generation.started is None else generation.started
            offset += size
            if generation.cancelled:
                self._settle(generation, _cancelled())
            elif part.stop == len(generation.rows):
                merged = np.concatenate(generation.images) if len(generation.images) > 1 else generation.images[0]
                self._settle(generation, Generated(merged, generation.made, generation.started, finished))

    def _after_step(self, batch: Batch, done: int, total: int) -> None:
        for generation, part in batch.parts:
            if generation.cancelled:
                self._settle(generation, _cancelled())
            elif not generation.settled:
                # scaled to the whole generation, whose rows may take several batches
                rows = len(generation.rows)
                generation.on_step((part.start * total + (part.stop - part.start) * done) // rows, total)
        if all(generation.settled for generation in batch.generations):
            raise _cancelled()

    def _fail(self, batch: Batch, error: OnTheFlyError) -> None:
        with self._wake:
            self._running = []
            for generation in batch.generations:
                self._batcher.remove(generation)
        for generation in batch.generations:
            self._settle(generation, error)

    def _settle(self, generation: Generation, outcome: Generated | OnTheFlyError) -> None:
        """End a generation's future, unless a cancel and the compute thread met and the other was first."""
        with self._wake:
            if generation.settled:
                return
            generation.settled = True
        if isinstance(outcome, Generated):
            generation.future.set_result(outcome)
        else:
            generation.future.set_exception(outcome)

    def _step(self, run: AdaptationRun) -> None:
        if run.cancelled:
            raise _cancelled()
        if run.steps is None:
            self._make_resident(run.base)
            run.steps = run.begin(self._backend)
        try:
            progress = next(run.steps)
        except StopIteration as end:
            with self._wake:
                self._adaptations.remove(run)
            run.future.set_result(end.value)
        else:
            if progress.loss is not None:
                self._metrics.adaptation_step(progress.loss)
            if progress.loss is not None or progress.made is not None or progress.data:
                run.on_progress(progress)

    def _end(self, run: AdaptationRun, error: OnTheFlyError) -> None:
        with self._wake:
            self._adaptations.remove(run)
        run.steps = None  # frees the optimiser's state
        run.future.set_exception(error)


def _cancelled() -> Cancelled:
    return Cancelled("cancelled: ask again if you still want it")
