"""What operators see: replicas, runs, dead letters. Bodies of `GET /v1/replicas`, `/v1/runs` and `/v1/dead-letters`.

Each field says who writes it and what None means. This module does not know where these lie (`bus_board`, `bus_dead`).
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from protocol.entries import DeadLetter, Sample
from protocol.messages import Message, Name, WeightsRef


class Replica(Message):
    """One generator replica, told by itself every few seconds; one that is silent is forgotten."""

    name: str  # unique among the replicas of a broker
    host: str
    pid: int
    started: float  # unix seconds
    seen: float  # unix seconds: when it said this
    state: Literal["loading", "ready", "stopping"]
    weights: WeightsRef | None  # resident, and serving requests that name none; None: still loading
    waiting_rows: int = 0  # rows that wait for its GPU
    images: int = 0  # made since it started
    busy_s: float = 0.0  # seconds of denoising since it started
    problem: str | None = None  # why it does not serve the weights that were activated; None: it does, or will


class ReplicaList(Message):
    object: Literal["list"] = "list"
    data: list[Replica]


class QueueDepths(Message):
    """Body of `GET /v1/queue`, counted by the broker. In work units, but for the dead letters."""

    waiting: int
    in_work: int
    dead: int


class RunPoint(Message):
    """One finished iteration."""

    iteration: int
    updates: int
    headline: str | None = None  # the task's main figure: "test_top1", "mAP", "verification"; None: nothing is held out
    score: float | None = None  # that figure, a part of one
    test_top1: float | None  # None: nothing is held out, or the task has another figure
    train_top1: float
    candidates: int  # synthetic samples handed to the iteration
    kept: int  # of them, trained on


class HardSample(Message):
    """A real sample that the model is unsure of now, as in the run's latest feedback."""

    sample_id: str
    class_name: str
    score: float


class RunStatus(Message):
    """One training run, told by its trainer every iteration, and in between when its state changes."""

    run: Name
    mode: str
    state: Literal["training", "waiting", "done", "stopped", "failed"]  # stopped: to go on when it is started again
    iteration: int  # in work now, from 0
    iterations: int
    updates: int  # optimiser updates done
    max_staleness: int  # K
    started: float  # unix seconds: this process of the trainer
    seen: float  # unix seconds: when it said this
    trainer_idle: float | None  # part of the time since `started` that it waited for samples; None: too early to say
    generator_idle: float | None  # part of the time since the first batch in which no replica made samples for it
    unused: int = 0  # samples that arrived and no iteration took yet
    stale: int = 0  # samples dropped for coming too late
    newest_feedback: int | None = None  # None: none yet
    oldest_useful: int | None = None  # feedback whose samples the iteration in work would still take
    curve: list[RunPoint] = []
    hard: list[HardSample] = []  # most marginal first, a few
    problem: str | None = None  # why it failed; None: it did not


class RunList(Message):
    object: Literal["list"] = "list"
    data: list[RunStatus]


class ShownSample(Message):
    """A recent synthetic sample of a run with a small picture of it, told by the replica that made it."""

    sample: Sample
    thumbnail: str  # base64 of a picture, of a clip an animated one
    media_type: Literal["image/png", "image/webp"] = "image/png"  # of the thumbnail


class ShownSampleList(Message):
    object: Literal["list"] = "list"
    data: list[ShownSample]


class DeadLetterInfo(Message):
    """A dead letter and the handle to retry or drop it by."""

    id: str = Field(pattern=r"^\d+-\d+$")  # stream entry id
    letter: DeadLetter
    unit_id: str | None  # None: the entry cannot be read, and so not be retried
    run: str | None
    feedback: int | None


class DeadLetterList(Message):
    object: Literal["list"] = "list"
    total: int  # on the stream, of which the newest are in `data`
    data: list[DeadLetterInfo]


class DeadLetterOutcome(Message):
    """Answer to a retry or a drop."""

    id: str
    done: Literal["retried", "dropped"]
    details: dict[str, Any] = {}
