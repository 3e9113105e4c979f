"""Batches of 1 MB through the queue, against a bare loop of redis-py on the same broker.

    python -m tests.benchmarks.bench_queue

Bare: redis-py as it comes, the payload inside the stream entry: XADD, XREADGROUP, XACK and XDEL. The queue: work units
planned, claimed and answered, and the batches taken in, with all checks; two SHA-256 of the payload cost most. The bare
loop with these two is measured too, to tell what they cost from what the queue does. One process sends and another
receives, as replica and trainer do: first as fast as both can, then one batch at a time for the latency. Rounds are in
turns, and ratios are medians over them. Goal: at least 0.8 of the bare loop's MB/s.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from contextlib import suppress
from itertools import count
from multiprocessing.connection import Connection
from time import perf_counter

import numpy as np
from redis import Redis
from redis.exceptions import ResponseError

from generator_service.allocator import keep_freed_memory
from protocol import codec
from protocol.broker import EmbeddedBroker
from protocol.bus import Bus, QueueConfig
from protocol.entries import Sample, SampleBatch, WorkRow, WorkUnit
from protocol.messages import FeedbackAccepted, WeightsRef
from tests.benchmarks.side_by_side import compare

ROWS, SIZE = 5, 256  # images of a batch, and their edge in pixels
WEIGHTS = WeightsRef(name="base", version=1, digest="0" * 64)
ROW = {"index": 0, "seed": 1, "label": 3, "class_name": "beagle", "prompt": "a photo of a beagle on a sofa"}
SAMPLING = {"steps": 50, "scheduler": "ddim", "strength": 0.75, "weights": WEIGHTS}


def payload() -> bytes:
    """The blob of a batch."""
    return codec.encode({"images": np.random.default_rng(0).integers(0, 256, (ROWS, SIZE, SIZE, 3), dtype=np.uint8)})


class Bare:
    """What the queue has to keep up with."""

    def __init__(self, url: str, data: bytes):
        self._sender, self._receiver, self._data = Redis.from_url(url), Redis.from_url(url), data
        with suppress(ResponseError):  # the other process was first
            self._sender.xgroup_create("bare", "readers", id="0", mkstream=True)

    def plan(self, batches: int) -> None:
        """Nothing is to be planned."""

    def send(self) -> None:
        self._sender.xadd("bare", {"body": self._data})

    def receive(self) -> bytes:
        reply = self._receiver.xreadgroup("readers", "reader", {"bare": ">"}, count=1, block=2000)
        assert reply
        entry_id, fields = reply[0][1][0]
        pipeline = self._receiver.pipeline()
        pipeline.xack("bare", "readers", entry_id)
        pipeline.xdel("bare", entry_id)
        pipeline.execute()
        return fields[b"body"]


class Digested(Bare):
    """The bare loop, and the two SHA-256 that it would need to know what it got."""

    def send(self) -> None:
        codec.digest(self._data)
        super().send()

    def receive(self) -> bytes:
        data = super().receive()
        codec.digest(data)
        return data


class Queue:
    """A replica and a trainer, without what they do with the batches."""

    def __init__(self, url: str, data: bytes):
        config = QueueConfig(url=url, batch_gate=10_000)  # sending is not held up
        self._replica, self._trainer, self._data = Bus(url, config), Bus(url, config), data
        self._feedbacks = count()

    def plan(self, batches: int) -> None:
        feedback = next(self._feedbacks)
        units = [_unit(feedback, number, batches) for number in range(batches)]
        reply = FeedbackAccepted(run="bench", feedback=feedback, units=batches, samples=batches * ROWS, weights=WEIGHTS)
        self._trainer.publish_plan("bench", feedback, str(feedback), units, {}, reply)

    def send(self) -> None:
        delivery = self._replica.claim_work("replica")
        assert delivery is not None and not self._replica.put_back_if_gated(delivery)
        assert self._replica.finish_work(delivery, _batch(delivery.message), self._data)

    def receive(self) -> bytes:
        delivery = self._trainer.next_batch("bench", "trainer", block_s=2.0)
        assert delivery is not None
        data = self._trainer.get_blob(delivery.message.blob)
        self._trainer.ack_batch(delivery)
        return data


Way = type[Bare] | type[Queue]


def _unit(feedback: int, number: int, units: int) -> WorkUnit:
    rows = [
        WorkRow(sample_id=f"{feedback}-{number}-{row}", source_id=f"beagle/{row}.jpg", guidance_scale=2.0, **ROW)
        for row in range(ROWS)
    ]
    return WorkUnit(
        id=f"bench.{feedback}.{number}",
        run="bench",
        feedback=feedback,
        unit=number,
        units=units,
        model_version=0,
        rows=rows,
        **SAMPLING,
    )


def _batch(unit: WorkUnit) -> SampleBatch:
    samples = [
        Sample(
            id=row.sample_id,
            run=unit.run,
            feedback=unit.feedback,
            model_version=0,
            source_id=row.source_id,
            guidance_scale=row.guidance_scale,
            created=0.0,
            **ROW,
            **SAMPLING,
        )
        for row in unit.rows
    ]
    same = unit.model_dump(include={"run", "feedback", "unit", "units", "model_version"})
    return SampleBatch(
        unit_id=unit.id,
        weights=WEIGHTS,
        samples=samples,
        blob=None,
        worker="replica",
        started=0.0,
        finished=0.0,
        **same,
    )


class Sender:
    """The sending side, in a process of its own."""

    def __init__(self, kind: Way, url: str):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_send, args=(kind, url, theirs), daemon=True)
        self._process.start()
        self._pipe.recv()

    def send(self, batches: int) -> None:
        """Begin to send so many; `wait` until it is done."""
        self._pipe.send(batches)

    def wait(self) -> None:
        self._pipe.recv()

    def close(self) -> None:
        self._pipe.send(0)
        self._process.join()


def _send(kind: Way, url: str, pipe: Connection) -> None:
    keep_freed_memory()
    way = kind(url, payload())
    pipe.send("ready")
    while batches := pipe.recv():
        for _ in range(batches):
            way.send()
        pipe.send("sent")


class Flow:
    """One way from process to process."""

    def __init__(self, kind: Way, url: str):
        self.sender, self._way = Sender(kind, url), kind(url, payload())

    def run(self, batches: int) -> None:
        """So many batches, sent and received at the same time."""
        self._way.plan(batches)
        self.sender.send(batches)
        for _ in range(batches):
            self._way.receive()
        self.sender.wait()

    def latencies(self, batches: int) -> list[float]:
        """Seconds from asking for a batch to be sent to having it, one at a time."""
        self._way.plan(batches)
        taken = []
        for _ in range(batches):
            began = perf_counter()
            self.sender.send(1)
            self._way.receive()
            taken.append(perf_counter() - began)
            self.sender.wait()
        return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batches", type=int, default=100, help="in each measurement")
    options = parser.parse_args()
    keep_freed_memory()  # for both sides alike
    with EmbeddedBroker() as broker:
        ways = {"bare loop": Flow(Bare, broker.url), "queue": Flow(Queue, broker.url)}
        bare, queue = ways.values()
        found = compare(lambda: bare.run(options.batches), lambda: queue.run(options.batches), options.rounds)
        size = len(payload()) / 1e6
        print(f"queue over a bare loop, {options.batches} batches of {size:.2f} MB: {found}")
        for name, seconds in (("bare loop", found.first_s), ("queue", found.second_s)):
            print(f"{name}: {size * options.batches / seconds:.0f} MB/s")
        digested = Flow(Digested, broker.url)
        found = compare(lambda: bare.run(options.batches), lambda: digested.run(options.batches), options.rounds)
        digested.sender.close()
        print(f"bare loop with two SHA-256 over one without: {found}")
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.rounds):
            for name, way in ways.items():
                times[name] += way.latencies(20)
        for name, way in ways.items():
            print(f"{name}: p50 {statistics.median(times[name]) * 1e3:.2f} ms from sending to having one batch")
            way.sender.close()


if __name__ == "__main__":
    main()
