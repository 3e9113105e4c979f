"""What is told on the board, on the embedded Valkey and on Redis."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator

import pytest
import redis

from protocol import keys
from protocol.broker import connect
from protocol.bus import Bus, BusConfig
from protocol.bus_board import Board
from protocol.entries import Sample
from protocol.errors import BrokerFull, BrokerUnavailable, UnknownRun
from protocol.messages import WeightsRef
from protocol.operations import Replica, RunPoint, RunStatus, ShownSample

FIRST = WeightsRef(name="pets", version=1, digest="a")
SECOND = WeightsRef(name="pets", version=2, digest="b")


@pytest.fixture
def raw(broker_url: str) -> Iterator[redis.Redis]:
    with connect(broker_url) as client:
        yield client


@pytest.fixture
def board(broker_url: str) -> Iterator[Board]:
    bus = Bus(broker_url, BusConfig(), patient=False)
    yield bus.board
    bus.close()


def a_replica(name: str, weights: WeightsRef | None = FIRST) -> Replica:
    return Replica(name=name, host="h", pid=1, started=1.0, seen=2.0, state="ready", weights=weights)


def a_run(name: str, seen: float = 2.0) -> RunStatus:
    return RunStatus(
        run=name,
        mode="async",
        state="training",
        iteration=1,
        iterations=5,
        updates=7,
        max_staleness=1,
        started=1.0,
        seen=seen,
        trainer_idle=0.25,
        generator_idle=None,
        curve=[RunPoint(iteration=0, updates=4, test_top1=None, train_top1=0.5, candidates=0, kept=0)],
    )


def a_sample(number: int, source: str) -> ShownSample:
    sample = Sample(
        id=f"{number:032x}",
        run="r",
        feedback=0,
        model_version=0,
        source_id=source,
        index=0,
        seed=number,
        label=0,
        class_name="c",
        prompt="c",
        guidance_scale=1.0,
        steps=4,
        scheduler="ddim",
        strength=0.5,
        weights=FIRST,
        created=3.0,
    )
    return ShownSample(sample=sample, thumbnail=base64.b64encode(b"png").decode())


def test_replicas_are_listed_until_they_are_silent_or_leave(board: Board, raw: redis.Redis):
    for name in ("b", "a", "c"):
        board.announce(a_replica(name))
    board.announce(a_replica("a", SECOND))
    assert [(replica.name, replica.weights) for replica in board.replicas()] == [
        ("a", SECOND),
        ("b", FIRST),
        ("c", FIRST),
    ]
    board.withdraw("b")
    assert 0 < raw.ttl(keys.replica("c")) <= keys.REPLICA_TTL_S
    raw.pexpire(keys.replica("c"), 1)
    time.sleep(0.01)
    assert [replica.name for replica in board.replicas()] == ["a"]
    assert raw.smembers(keys.REPLICAS) == {b"a"}


def test_the_choice_of_weights_lasts_while_somebody_serves_it(board: Board, raw: redis.Redis):
    assert board.chosen_weights() is None
    board.choose_weights(SECOND)
    raw.expire(keys.CHOICE, 5)
    board.keep_choice(FIRST)
    assert raw.ttl(keys.CHOICE) <= 5, "a replica that serves others must not prolong it"
    board.keep_choice(SECOND)
    assert raw.ttl(keys.CHOICE) > 5
    assert board.chosen_weights() == SECOND


def test_runs_are_listed_the_last_heard_from_first(board: Board):
    board.report(a_run("old", seen=1.0))
    board.report(a_run("new", seen=2.0))
    assert [status.run for status in board.runs()] == ["new", "old"]
    assert board.run("old") == a_run("old", seen=1.0)
    board.show("old", [a_sample(1, "s")])
    board.forget("old")
    assert [status.run for status in board.runs()] == ["new"]
    assert board.samples("old", 10) == []
    with pytest.raises(UnknownRun, match="'old'"):
        board.run("old")


def test_what_cannot_be_read_is_left_out(board: Board, raw: redis.Redis):
    board.report(a_run("good"))
    raw.set(keys.run("bad"), b'{"run": "bad", "from": "another version"}')
    raw.sadd(keys.RUNS, "bad")
    assert [status.run for status in board.runs()] == ["good"]


def test_samples_are_the_newest_and_of_the_sources_asked_for(board: Board, raw: redis.Redis):
    board.show("r", [a_sample(number, f"s{number % 2}") for number in range(10)])
    assert [shown.sample.seed for shown in board.samples("r", 3)] == [9, 8, 7]
    assert [shown.sample.seed for shown in board.samples("r", 2, ["s0"])] == [8, 6]
    board.show("r", [a_sample(number, "s2") for number in range(10, 10 + keys.SHOWN_LIMIT)])
    assert raw.llen(keys.shown("r")) == keys.SHOWN_LIMIT
    assert board.samples("r", 1, ["s0"]) == []
    assert raw.ttl(keys.shown("r")) > 0


def test_a_broker_without_memory_still_hears_of_replicas_and_runs_but_takes_no_samples(board: Board, raw: redis.Redis):
    raw.config_set("maxmemory", 1)
    try:
        board.announce(a_replica("a"))
        board.report(a_run("r"))
        board.choose_weights(FIRST)
        board.keep_choice(FIRST)
        with pytest.raises(BrokerFull):
            board.show("r", [a_sample(1, "s")])
        assert (board.replicas()[0].name, board.run("r").run, board.chosen_weights()) == ("a", "r", FIRST)
    finally:
        raw.config_set("maxmemory", 0)


def test_a_broker_that_is_away_is_told():
    bus = Bus("redis://127.0.0.1:9/0", BusConfig(), patient=False)
    for ask in (bus.board.replicas, bus.board.runs, bus.board.chosen_weights):
        with pytest.raises(BrokerUnavailable):
            ask()
    bus.close()
