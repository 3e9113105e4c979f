"""Dead letters are looked at, retried and dropped; lost answers are asked for again, or become dead letters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import redis

from protocol import codec, keys
from protocol.broker import connect
from protocol.bus import Bus, BusConfig, Delivery
from protocol.bus_failure import failed_batch
from protocol.bus_lost import unit_of
from protocol.entries import SampleBatch, WorkUnit
from protocol.errors import BlobMissing, BrokerFull, Conflict, GenerationFailed, QueueFull, UnknownDeadLetter
from tests.protocol.messages_to_send import batch, pixels, reply, unit

PROBLEM = GenerationFailed("no").to_problem()


@pytest.fixture
def raw(broker_url: str) -> Iterator[redis.Redis]:
    with connect(broker_url) as client:
        yield client


@pytest.fixture(params=["blobs on the broker", "blobs in a folder"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return None if request.param == "blobs on the broker" else tmp_path / "blobs"


@pytest.fixture
def bus(broker_url: str, folder: Path | None) -> Iterator[Bus]:
    made = Bus(broker_url, BusConfig(work_gate=3, blob_dir=folder))
    yield made
    made.close()


def publish(bus: Bus, count: int = 1, *, feedback: int = 0) -> list[WorkUnit]:
    """Units with init images."""
    blobs = {f"init.{feedback}.{n}": codec.encode({"images": np.full((1, 2, 2, 3), n, np.uint8)}) for n in range(count)}
    refs = [bus.blob_ref(name, data) for name, data in blobs.items()]
    units = [unit(feedback=feedback, number=n, units=count, init=refs[n]) for n in range(count)]
    bus.publish_plan("r", feedback, "print", units, blobs, reply(feedback=feedback, units=count))
    return units


def claim(bus: Bus) -> Delivery[WorkUnit]:
    delivery = bus.claim_work("w1", 0)
    assert delivery is not None
    return delivery


def fail(bus: Bus) -> str:
    """Fail the next unit, and take its answer in; the id of its dead letter."""
    assert bus.fail_work(claim(bus), PROBLEM) is True
    bus.ack_batch(answer(bus))
    return bus.dead.newest(1).data[0].id


def answer(bus: Bus) -> Delivery[SampleBatch]:
    delivery = bus.next_batch("r", "trainer", 0)
    assert delivery is not None
    return delivery


def blobs(raw: redis.Redis, folder: Path | None) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder else sorted(map(str, raw.scan_iter(keys.blob("*"))))


# ---------------------------------------------------------------- dead letters


def test_newest_first_and_page_by_page(bus: Bus) -> None:
    units = publish(bus, 3)
    for _ in units:
        fail(bus)
    listed = bus.dead.newest(2)
    assert listed.total == 3
    assert [(info.unit_id, info.run, info.feedback) for info in listed.data] == [
        ("r.0.2.print", "r", 0),
        ("r.0.1.print", "r", 0),
    ]
    assert listed.data[0].letter.problem == PROBLEM
    rest = bus.dead.newest(2, before=listed.data[-1].id)
    assert [info.unit_id for info in rest.data] == ["r.0.0.print"]


def test_a_retried_unit_is_made_from_the_same_images_and_answered_again(
    bus: Bus, raw: redis.Redis, folder: Path | None
) -> None:
    [sent] = publish(bus)
    letter = fail(bus)
    assert bus.dead.retry(letter).details == {"unit_id": sent.id}
    assert bus.dead.newest().total == 0
    delivery = claim(bus)
    assert (delivery.message, delivery.deliveries) == (sent, 1)
    assert codec.decode(bus.get_blob(sent.init_blob))["images"].shape == (1, 2, 2, 3)
    assert bus.finish_work(delivery, batch(delivery), pixels(delivery)) is True
    made = answer(bus)
    assert made.message.error is None
    bus.ack_batch(made)
    assert blobs(raw, folder) == []


def test_retrying_twice_asks_once(bus: Bus, raw: redis.Redis) -> None:
    publish(bus)
    letter = fail(bus)
    bus.dead.retry(letter)
    for again in (bus.dead.retry, bus.dead.drop):
        with pytest.raises(UnknownDeadLetter, match=letter):
            again(letter)
    assert raw.xlen(keys.WORK) == 1


def test_a_worker_that_comes_late_does_not_answer_a_retried_unit(bus: Bus, raw: redis.Redis) -> None:
    publish(bus)
    slow = claim(bus)
    raw.xclaim(keys.WORK, keys.WORK_GROUP, "w1", 0, [slow.entry_id], idle=3_600_000, justid=True)
    bus.dead.retry(fail(bus))
    assert bus.finish_work(slow, batch(slow), pixels(slow)) is False
    assert bus.next_batch("r", "trainer", 0) is None
    assert claim(bus).message.id == slow.message.id


def test_dropping_removes_the_images_too(bus: Bus, raw: redis.Redis, folder: Path | None) -> None:
    publish(bus)
    letter = fail(bus)
    assert len(blobs(raw, folder)) == 1
    assert bus.dead.drop(letter).done == "dropped"
    assert (bus.dead.newest().data, blobs(raw, folder)) == ([], [])


def test_a_unit_without_its_images_is_not_retried(bus: Bus, raw: redis.Redis) -> None:
    [sent] = publish(bus)
    letter = fail(bus)
    bus.drop_blob(sent.init_blob)
    with pytest.raises(BlobMissing, match="drop the dead letter"):
        bus.dead.retry(letter)
    assert (raw.xlen(keys.WORK), raw.exists(keys.done(sent.id)), bus.dead.newest().total) == (0, 1, 1)


def test_an_entry_that_cannot_be_read_is_listed_and_only_dropped(bus: Bus, raw: redis.Redis) -> None:
    raw.xadd(keys.WORK, {"body": '{"id": "half'})
    assert bus.claim_work("w1", 0) is None
    raw.xadd(keys.DEAD, {"body": "not even a letter"})
    for info in bus.dead.newest().data:
        assert (info.unit_id, info.run, info.feedback) == (None, None, None)
        with pytest.raises(Conflict, match="drop it"):
            bus.dead.retry(info.id)
        bus.dead.drop(info.id)
    assert bus.dead.newest().total == 0


def test_retrying_respects_the_gate_and_memory(bus: Bus, raw: redis.Redis) -> None:
    publish(bus)
    letter = fail(bus)
    publish(bus, 3, feedback=1)
    with pytest.raises(QueueFull, match="work_gate = 3"):
        bus.dead.retry(letter)
    claimed = claim(bus)
    bus.finish_work(claimed, batch(claimed), pixels(claimed))
    raw.config_set("maxmemory", 1)
    try:
        with pytest.raises(BrokerFull):
            bus.dead.retry(letter)
    finally:
        raw.config_set("maxmemory", 0)
    assert bus.dead.newest().total == 1
    assert bus.dead.retry(letter).done == "retried"


def test_a_run_that_starts_anew_takes_its_dead_letters_along(bus: Bus, raw: redis.Redis, folder: Path | None) -> None:
    publish(bus)
    fail(bus)
    bus.forget_run("other")
    assert bus.dead.newest().total == 1
    bus.forget_run("r")
    assert (bus.dead.newest().total, blobs(raw, folder)) == (0, [])


# ---------------------------------------------------------------- lost answers


def make(bus: Bus) -> Delivery[SampleBatch]:
    """The answer to the next unit, in the trainer's hands."""
    delivery = claim(bus)
    assert bus.finish_work(delivery, batch(delivery), pixels(delivery)) is True
    return answer(bus)


def test_an_answer_says_all_that_its_unit_did(bus: Bus) -> None:
    [sent] = publish(bus)
    assert unit_of(make(bus).message) == sent


def test_what_an_answer_had_given_up_stays_so_when_it_is_lost(bus: Bus) -> None:
    publish(bus)
    made = make(bus).message.model_copy(update={"missing": ["black"]})
    again = unit_of(made)
    assert again.missing == ["black"] and [row.sample_id for row in again.rows] == [made.samples[0].id]
    assert failed_batch(again, "w", PROBLEM).missing == ["black", made.samples[0].id]


def test_a_lost_answer_is_asked_for_again_and_given_up_as_a_dead_letter(
    bus: Bus, raw: redis.Redis, folder: Path | None
) -> None:
    [sent] = publish(bus)
    lost = make(bus)
    bus.drop_blob(lost.message.blob)
    raw.config_set("maxmemory", 1)  # asking again needs no memory that it does not free
    try:
        bus.lost.ask_again(lost)
    finally:
        raw.config_set("maxmemory", 0)
    bus.lost.ask_again(lost)  # a repetition
    assert (raw.xlen(keys.WORK), raw.xlen(keys.batches("r"))) == (1, 0)
    second = make(bus)
    assert second.message.attempt == 2
    assert bus.get_blob(second.message.blob) and bus.get_blob(second.message.init_blob)
    bus.lost.give_up(second, PROBLEM)
    bus.lost.give_up(second, PROBLEM)
    [info] = bus.dead.newest().data
    assert (info.unit_id, info.letter.problem) == (sent.id, PROBLEM)
    assert len(blobs(raw, folder)) == 1  # the init images
    bus.dead.retry(info.id)
    assert claim(bus).message == sent
