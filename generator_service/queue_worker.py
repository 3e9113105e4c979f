"""Takes work units off the broker, has the engine make them, and publishes the batches.

A few threads run the same straight line, each with a connection of its own: while one unit is denoised, another is
claimed and prepared, and a third published, so that the GPU does not wait. Each holds its unit's lease throughout. A
unit of a run that does not take in its batches goes back to the queue's tail at once. A unit that was made is kept
until there is room for it, on the disk and on the broker; one that is given up is there for others at once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from agent.captions import Perturber
from agent.expressions.compose import Composer
from generator_service.backends.interface import Row, Sampling
from generator_service.batching import Generation
from generator_service.boundary import guard
from generator_service.composition import composed
from generator_service.engine import Engine
from generator_service.perturbation import perturbed
from generator_service.results import Recorder
from generator_service.showcase import show
from generator_service.telemetry import Telemetry
from generator_service.unit_watch import UnitWatch
from generator_service.weights import WeightStore
from protocol import codec
from protocol.bus import Bus, Delivery
from protocol.dataset import Dataset
from protocol.entries import WorkRow, WorkUnit
from protocol.errors import (
    BlobCorrupt,
    Cancelled,
    DiskFull,
    InvalidRequest,
    OnTheFlyError,
    Retryable,
    UnknownClass,
    UnknownSource,
)
from protocol.interruption import Interruption

log = logging.getLogger(__name__)

Result = TypeVar("Result")

BLOCK_S = 1.0  # of a blocking claim; also how long shutdown waits for an idle thread
JOIN_S = 10.0  # that stopping waits for the threads
RETRY_S = 1.0  # between attempts, while the broker is away, or something is full
QUIET_S = 3.0  # without a failure until that is over; longer than RETRY_S, since several threads try
GATED_REST_S = 0.5  # after a round of nothing but units that are put back
GATED_ROUND = 100  # units put back without a rest, at most


class QueueWorkers:
    """The replica's readers of the stream `work`."""

    def __init__(
        self,
        connect: Callable[[], Bus],
        engine: Engine,
        weights: WeightStore,
        dataset: Dataset | None,
        recorder: Recorder,
        telemetry: Telemetry,
        perturb: Perturber,
        compose: Composer | None,
        *,
        name: str,
        threads: int,
        deterministic: bool,
    ):
        """
        Args:
            connect: a new connection to the broker.
            perturb: makes the versions of captions that units ask for.
            compose: writes the prompts of clips that units ask for; None: the backend makes images.
            name: of this replica; unique among the consumers of the group.
            threads: units in hand at a time: one denoised, the others being prepared or published.
            deterministic: never merge a unit with others.
        """
        self._connect, self._engine, self._weights = connect, engine, weights
        self._dataset, self._recorder, self._telemetry, self._name = dataset, recorder, telemetry, name
        self._perturb, self._compose = perturb, compose
        self._deterministic = deterministic
        self._stop = threading.Event()
        self._interruptions: dict[str, Interruption] = {}  # error code -> whether that is the case now
        self._threads = [
            threading.Thread(target=self._serve, args=(f"{name}-{index}",), name=f"queue-{index}", daemon=True)
            for index in range(threads)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def ask_to_stop(self) -> None:
        """Claim no more. What the engine still finishes is published; once it stopped, other units are released."""
        self._stop.set()

    def join(self) -> None:
        """Wait for the threads to end; one that hangs on a broker which does not answer is left to the end of the
        process, and its unit to the other replicas."""
        deadline = time.monotonic() + JOIN_S
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))

    def _serve(self, consumer: str) -> None:
        bus = self._connect()
        gated: set[str] = set()  # units put back since this thread last rested
        while not self._stop.is_set():
            guard(lambda: self._turn(bus, consumer, gated), self._pause)
        bus.close()

    def _turn(self, bus: Bus, consumer: str, gated: set[str]) -> None:
        delivery = bus.claim_work(consumer, BLOCK_S)
        self._look_around()
        if delivery is None:
            return
        if bus.put_back_if_gated(delivery):
            self._rest_after_round(delivery.message.id, gated)
        else:
            self._answer(bus, delivery)

    def _rest_after_round(self, unit_id: str, gated: set[str]) -> None:
        """Units are put back at the tail: one that comes by again means that somebody looked at all the others."""
        if unit_id in gated or len(gated) >= GATED_ROUND:
            self._stop.wait(GATED_REST_S)
            gated.clear()
        gated.add(unit_id)

    def _answer(self, bus: Bus, delivery: Delivery[WorkUnit]) -> None:
        """One unit from claim to publication, under its lease. Raises Retryable when the broker goes away meanwhile."""
        given_up: list[OnTheFlyError] = []

        def fail(error: OnTheFlyError) -> None:
            if isinstance(error, Cancelled | Retryable | DiskFull):
                watch.released(error, lease_lost=lease.lost.is_set())
                given_up.append(error)
                return
            watch.failed(error)
            bus.fail_work(delivery, error.to_problem())

        with UnitWatch(delivery, self._telemetry) as watch, bus.lease(delivery) as lease:
            guard(lambda: self._make(bus, delivery, lease.lost, watch), fail)
        if given_up:
            bus.release(delivery)
            self._stop.wait(RETRY_S)  # it would be claimed again at once

    def _make(self, bus: Bus, delivery: Delivery[WorkUnit], lost: threading.Event, watch: UnitWatch) -> None:
        began = time.monotonic()
        unit = perturbed(delivery.message, self._perturb, bus.captions)
        unit = composed(unit, self._compose, bus.captions, self._first_frame)
        captions_s = time.monotonic() - began if unit is not delivery.message else 0.0
        generation = self._generation(bus, unit)

        def drop_when_lost(done: int, total: int) -> None:
            if lost.is_set():
                self._engine.cancel(generation)

        generation.on_step = drop_when_lost
        generated = self._engine.submit(generation).result()
        watch.made(generated)
        batch, images = self._recorder.sample_batch(unit, generated, self._name, captions_s)
        # recorded first, so that whoever reads the batch finds them
        self._keep_trying(lambda: self._recorder.samples.add(batch.samples))
        data = codec.encode({"images": images}) if len(images) else None
        first = self._keep_trying(lambda: bus.finish_work(delivery, batch, data))
        watch.published(first)
        if first:
            show(bus.board, batch, images)

    def _keep_trying(self, action: Callable[[], Result]) -> Result:
        """Until there is room for what was made, or the replica stops."""
        while True:
            try:
                return action()
            except (Retryable, DiskFull) as error:
                if self._stop.is_set():
                    raise
                self._pause(error)

    def _generation(self, bus: Bus, unit: WorkUnit) -> Generation:
        weights = self._weights.pinned(unit.weights)
        images = self._init_images(bus, unit)
        rows = [
            Row(
                seed=row.seed,
                label=_label(row, weights.classes),
                guidance_scale=row.guidance_scale,
                prompt=row.prompt,
                negative_prompt=row.negative_prompt,
                image=image,
                guidance=row.guidance,
            )
            for row, image in zip(unit.rows, images, strict=True)
        ]
        return Generation(weights, _sampling(unit), rows, lane="queue", alone=self._deterministic)

    def _init_images(self, bus: Bus, unit: WorkUnit) -> list[np.ndarray | None]:
        """uint8 [H, W, 3] for each row, of a clip its first frame; or None for rows that start from noise."""
        if unit.init_blob is not None:
            images = codec.decode(bus.get_blob(unit.init_blob)).get("images")
            if images is None or images.shape[0] != len(unit.rows):
                raise BlobCorrupt(f"the init images of unit {unit.id} do not match its {len(unit.rows)} rows")
            return list(images)
        frames = {(row.init_id, row.init_frame): row for row in unit.rows if row.init_id is not None}
        found = {place: self._first_frame(row) for place, row in frames.items()}
        images = [found.get((row.init_id, row.init_frame)) for row in unit.rows]
        if unit.frames is not None and any(image is None for image in images):
            raise InvalidRequest(
                f"a row of unit {unit.id} has no first frame, which a clip begins with: mount a dataset that its "
                "planner can take one from"
            )
        return images

    def _first_frame(self, row: WorkRow) -> np.ndarray:
        """uint8 [H, W, 3] of the sample that a row starts from."""
        if self._dataset is None or row.init_id is None or row.init_id not in self._dataset:
            raise UnknownSource(
                f"sample {row.init_id!r} is not in this replica's dataset: mount the same dataset on every replica"
            )
        return self._dataset.image(row.init_id, row.init_frame)

    def _pause(self, error: OnTheFlyError) -> None:
        self._interruptions.setdefault(error.code, _interruption(error.code)).failed(error)
        self._stop.wait(error.retry_after or RETRY_S)

    def _look_around(self) -> None:
        for interruption in list(self._interruptions.values()):
            interruption.worked()


def _interruption(code: str) -> Interruption:
    """A line in the log when it begins, and one when it is over."""
    return Interruption(
        lambda error: log.warning("queued work pauses: %s", error.message, extra={"event": code}),
        lambda: log.info("queued work goes on", extra={"event": "recovered", "from": code}),
        quiet_s=QUIET_S,
    )


def _sampling(unit: WorkUnit) -> Sampling:
    """What the rows of a unit share."""
    strongest = (row.guidance_scale if row.guidance is None else row.guidance.maximum for row in unit.rows)
    return Sampling(
        steps=unit.steps,
        scheduler=unit.scheduler,
        strength=unit.strength,
        guided=unit.policy or max(strongest) > 1.0,
        lora_scale=unit.lora_scale,
        frames=unit.frames,
        resampling=unit.resampling,
        policy=unit.policy,
    )


def _label(row: WorkRow, classes: tuple[str, ...]) -> int | None:
    """Index into the weights' classes, which the trainer's labels need not follow."""
    if not classes:
        return None
    if row.class_name not in classes:
        raise UnknownClass(f"these weights do not know class {row.class_name!r}: adapt them to this dataset first")
    return classes.index(row.class_name)
