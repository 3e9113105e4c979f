"""What may share a GPU batch, and which batch is next. Pure bookkeeping: no threads, no clock of its own, no torch.

Rows share a batch when their compatibility keys are equal; prompt, seed, class, guidance value and init image are per
row. Two lanes, synchronous requests and queued work units, take turns when both wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from generator_service.backends.interface import OnStep, Row, Sampling, WeightSet
from protocol import logs, tracing
from protocol.errors import InvalidRequest, QueueFull
from protocol.messages import WeightsRef

Lane = Literal["request", "queue"]


@dataclass(frozen=True)
class Key:
    """Rows with equal keys may share a batch. Size and dtype are the backend's own, one of each in a process."""

    backend: str
    weights: WeightsRef
    sampling: Sampling  # steps, scheduler, guided or not; and strength, since multistep solvers carry state


@dataclass(frozen=True)
class Generated:
    """What a generation's future gives."""

    images: np.ndarray  # uint8 [rows, H, W, 3], of clips [rows, M, H, W, 3]
    rows: list[Row]  # as they were made: with what a policy chose
    started: float  # unix seconds; the denoising interval of its batches
    finished: float


@dataclass(eq=False)
class Generation:
    """What one caller wants: rows that share weights and settings."""

    weights: WeightSet
    sampling: Sampling
    rows: list[Row]
    lane: Lane = "request"
    owner: str = ""  # whose request it is; "": work of the queue
    alone: bool = False  # never merged with others and never split, so that its pixels are reproducible to the bit
    on_step: OnStep = lambda done, total: None  # called from the compute thread
    future: Future[Generated] = field(default_factory=Future)
    origin: str | None = field(default_factory=tracing.traceparent)  # of the span that wants it
    about: Mapping[str, Any] = field(default_factory=logs.current)  # fields of its caller's log lines

    # bookkeeping of the batcher and the engine
    arrived: float = 0.0
    taken: int = 0  # rows that went into batches
    images: list[np.ndarray] = field(default_factory=list)  # of the batches that ended
    made: list[Row] = field(default_factory=list)  # the rows of those, as they were made
    started: float | None = None
    cancelled: bool = False
    settled: bool = False  # its future has, or is about to get, a result

    def __post_init__(self) -> None:
        self.future.set_running_or_notify_cancel()  # only the engine ends it: see Engine.cancel

    @property
    def key(self) -> Key:
        return Key(self.weights.backend, self.weights.ref, self.sampling)


@dataclass(frozen=True)
class Batch:
    """Rows to denoise together: slices of generations, in order."""

    parts: list[tuple[Generation, slice]]
    taken: float  # when, on the clock of `Generation.arrived`

    @property
    def rows(self) -> list[Row]:
        return [row for generation, part in self.parts for row in generation.rows[part]]

    @property
    def about(self) -> Mapping[str, Any]:
        """What its log lines name: its first caller."""
        return self.parts[0][0].about

    @property
    def generations(self) -> list[Generation]:
        return [generation for generation, _ in self.parts]


class Batcher:
    """Generations that wait, and the next batch of them. Not thread-safe."""

    def __init__(self, max_batch: int, window_s: float):
        """
        Args:
            max_batch: rows in a merged batch. A generation that runs alone may be larger.
            window_s: how long a batch that is not full waits for more rows.
        """
        self._max_batch, self._window_s = max_batch, window_s
        self._lanes: dict[Lane, deque[Generation]] = {"request": deque(), "queue": deque()}
        self._order: deque[Lane] = deque(("request", "queue"))
        self._batch_end = float("-inf")

    def add(self, generation: Generation, now: float) -> None:
        generation.arrived = now
        self._lanes[generation.lane].append(generation)

    def check_room(self, generation: Generation, of_all: int, of_owner: int) -> None:
        """Raises QueueFull: with its images, more than `of_all` would wait in its lane, or more than `of_owner` of its
        owner's; and InvalidRequest: so would it be with its clips alone. A frame of a clip counts as an image, for it
        takes as long."""
        frames = generation.sampling.frames
        wanted = len(generation.rows) * (frames or 1)
        for whose, owner, limit in (("", None, of_all), ("of yours ", generation.owner, of_owner)):
            if frames is not None and wanted > limit:
                raise InvalidRequest(
                    f"{len(generation.rows)} x {frames} frames are {wanted} images, and at most {limit} {whose}may "
                    "wait: ask for fewer clips at a time or for shorter ones, or raise generator.max_waiting_rows and "
                    "generator.limits",
                    param="num_frames",
                )
            waiting = self._waiting_images(generation.lane, owner)
            if waiting + wanted > limit:
                raise QueueFull(f"{waiting} images {whose}wait already and at most {limit} may: try again in a moment")

    def remove(self, generation: Generation) -> None:
        """Forget the rows of a generation that still wait, if any."""
        lane = self._lanes[generation.lane]
        if generation in lane:
            lane.remove(generation)

    def drain(self) -> list[Generation]:
        """Forget everything that waits, and return it."""
        waiting = [generation for lane in self._lanes.values() for generation in lane]
        for lane in self._lanes.values():
            lane.clear()
        return waiting

    def waiting_rows(self, lane: Lane) -> int:
        return sum(len(generation.rows) - generation.taken for generation in self._lanes[lane])

    def _waiting_images(self, lane: Lane, owner: str | None) -> int:
        """Of one owner; None: of all."""
        waiting = (g for g in self._lanes[lane] if owner in (None, g.owner))
        return sum((len(g.rows) - g.taken) * (g.sampling.frames or 1) for g in waiting)

    def batch_ended(self, now: float) -> None:
        """The window counts from here too: callers that were just answered may have more, and batches stay full."""
        self._batch_end = now

    def take(self, now: float) -> Batch | None:
        """The next batch; None while nothing waits or all of it may still fill up (see `due`)."""
        for lane in tuple(self._order):
            for lead in self._leads(lane):
                if self._size(lead) >= self._max_batch or self._ripe(lead) <= now:
                    self._order.remove(lane)
                    self._order.append(lane)
                    return self._merge(lead, now)
        return None

    def due(self) -> float | None:
        """When `take` will have a batch if nothing else arrives; None: nothing waits."""
        return min((self._ripe(lead) for lane in self._lanes for lead in self._leads(lane)), default=None)

    def _leads(self, lane: Lane) -> list[Generation]:
        """The oldest generation of each key in a lane, oldest first."""
        oldest: dict[object, Generation] = {}
        for generation in self._lanes[lane]:
            oldest.setdefault(generation if generation.alone else generation.key, generation)
        return list(oldest.values())

    def _ripe(self, lead: Generation) -> float:
        if lead.alone:
            return lead.arrived
        return max(lead.arrived, self._batch_end) + self._window_s

    def _mates(self, lead: Generation) -> list[Generation]:
        if lead.alone:
            return [lead]
        lanes = sorted(self._lanes, key=lambda lane: lane != lead.lane)  # the lead's own lane first
        return [g for lane in lanes for g in self._lanes[lane] if not g.alone and g.key == lead.key]

    def _size(self, lead: Generation) -> int:
        return sum(len(mate.rows) - mate.taken for mate in self._mates(lead))

    def _merge(self, lead: Generation, now: float) -> Batch:
        parts, room = [], len(lead.rows) if lead.alone else self._max_batch
        for mate in self._mates(lead):
            count = min(room, len(mate.rows) - mate.taken)
            if count == 0:
                break
            parts.append((mate, slice(mate.taken, mate.taken + count)))
            mate.taken += count
            room -= count
            if mate.taken == len(mate.rows):
                self._lanes[mate.lane].remove(mate)
        return Batch(parts, now)
