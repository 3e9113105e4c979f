"""The queue's contract, on the embedded Valkey and on Redis."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import redis

from protocol import codec, keys
from protocol.broker import EmbeddedBroker, connect
from protocol.bus import Bus, BusConfig, Delivery
from protocol.bus_group import Group
from protocol.entries import BlobRef, WorkUnit
from protocol.errors import (
    BlobCorrupt,
    BlobMissing,
    BrokerUnavailable,
    ConfigError,
    GenerationFailed,
    IdempotencyConflict,
    QueueFull,
)
from tests.protocol.messages_to_send import batch, pixels, reply, unit

IDLE_S = 0.25


@pytest.fixture
def raw(broker_url: str) -> Iterator[redis.Redis]:
    with connect(broker_url) as client:
        yield client


@pytest.fixture(params=["blobs on the broker", "blobs in a folder"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return None if request.param == "blobs on the broker" else tmp_path / "blobs"


@pytest.fixture
def bus(broker_url: str) -> Iterator[Bus]:
    made = Bus(broker_url, BusConfig(lease_idle_s=IDLE_S, max_deliveries=2, work_gate=5, batch_gate=2))
    yield made
    made.close()


def publish(bus: Bus, count: int = 1, feedback: int = 0) -> list[WorkUnit]:
    units = [unit(feedback=feedback, number=number, units=count) for number in range(count)]
    bus.publish_plan("r", feedback, "print", units, {}, reply(feedback=feedback, units=count))
    return units


def claim(bus: Bus, consumer: str = "w1") -> Delivery[WorkUnit]:
    delivery = bus.claim_work(consumer, 0)
    assert delivery is not None
    return delivery


def expire(raw: redis.Redis, delivery: Delivery) -> None:
    """As if its holder had not renewed for an hour."""
    group = keys.WORK_GROUP if delivery.stream == keys.WORK else keys.BATCH_GROUP
    raw.xclaim(delivery.stream, group, delivery.consumer, 0, [delivery.entry_id], idle=3_600_000, justid=True)


# ---------------------------------------------------------------- the whole way


def test_a_unit_and_its_pixels_go_all_the_way_and_leave_only_markers(
    broker_url: str, raw: redis.Redis, folder: Path | None
) -> None:
    bus = Bus(broker_url, BusConfig(blob_dir=folder))
    init = codec.encode({"images": np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3)})
    sent = unit(init=bus.blob_ref("r.0.0.init", init))
    assert bus.publish_plan("r", 0, "print", [sent], {"r.0.0.init": init}, reply()) == reply()

    delivery = claim(bus)
    assert delivery.message == sent
    assert bus.get_blob(delivery.message.init_blob) == init
    made = pixels(delivery)
    assert bus.finish_work(delivery, batch(delivery), made) is True

    answer = bus.next_batch("r", "trainer", 0)
    assert answer.message.model_copy(update={"blob": None, "init_blob": None}) == batch(delivery)
    assert bus.get_blob(answer.message.blob) == made
    assert bus.get_blob(answer.message.init_blob) == init  # so that the unit can be asked for again
    bus.ack_batch(answer)

    assert bus.next_batch("r", "trainer", 0) is None
    assert raw.xlen(keys.WORK) == raw.xlen(keys.batches("r")) == 0
    assert raw.xpending(keys.batches("r"), keys.BATCH_GROUP)["pending"] == 0
    left = {key.decode() for key in raw.scan_iter()}
    assert left == {keys.WORK, keys.batches("r"), keys.done("r.0.0.print"), keys.plan("r", 0)}
    assert all(raw.ttl(key) > 0 for key in (keys.done("r.0.0.print"), keys.plan("r", 0)))
    assert folder is None or list(folder.iterdir()) == []
    bus.close()


def test_units_come_in_order_each_to_one_worker(bus: Bus) -> None:
    units = publish(bus, 3)
    assert bus.depths() == {"waiting": 3, "in_work": 0, "dead": 0}
    got = [claim(bus, consumer) for consumer in ("w1", "w2", "w1")]
    assert [delivery.message for delivery in got] == units
    assert [delivery.deliveries for delivery in got] == [1, 1, 1]
    assert bus.claim_work("w2", 0.01) is None
    assert bus.depths() == {"waiting": 0, "in_work": 3, "dead": 0}


def test_a_blocked_reader_gets_what_is_published_meanwhile(bus: Bus) -> None:
    got: list[Delivery[WorkUnit] | None] = []
    reader = threading.Thread(target=lambda: got.append(bus.claim_work("w1", 2.0)))
    reader.start()
    publish(bus)  # over the same Bus: the blocked reader's connection is its own
    reader.join()
    assert got[0] is not None and got[0].message.id == "r.0.0.print"


# ---------------------------------------------------------------- publishing


def test_a_repeated_plan_publishes_nothing_and_gets_the_first_reply(bus: Bus, raw: redis.Redis) -> None:
    publish(bus, 2)
    again = bus.publish_plan("r", 0, "print", [unit(number=9)], {}, reply(units=9))
    assert again == reply(units=2)
    assert raw.xlen(keys.WORK) == 2


def test_another_body_for_the_same_feedback_is_a_conflict(bus: Bus, raw: redis.Redis) -> None:
    publish(bus)
    with pytest.raises(IdempotencyConflict, match=r"feedback 0 of run 'r'.*another body"):
        bus.publish_plan("r", 0, "other", [unit()], {}, reply())
    assert raw.xlen(keys.WORK) == 1


def test_the_work_gate_refuses_what_does_not_fit_but_never_starves_an_empty_queue(bus: Bus, raw: redis.Redis) -> None:
    publish(bus, 7, feedback=0)  # more than the gate of 5, on an empty queue
    with pytest.raises(QueueFull, match="7 work units are waiting and 1 more") as refused:
        publish(bus, 1, feedback=1)
    assert refused.value.retry_after is not None
    assert raw.xlen(keys.WORK) == 7 and not raw.exists(keys.plan("r", 1))
    for _ in range(3):
        delivery = claim(bus)
        bus.finish_work(delivery, batch(delivery), None)
    publish(bus, 1, feedback=1)
    assert raw.xlen(keys.WORK) == 5


def test_a_plan_that_does_not_fit_in_memory_leaves_nothing(bus: Bus, raw: redis.Redis) -> None:
    blob = bytes(100_000)
    sent = unit(init=bus.blob_ref("b", blob))
    raw.config_set("maxmemory", 1)
    try:
        with pytest.raises(QueueFull, match="out of memory"):
            bus.publish_plan("r", 0, "print", [sent], {"b": blob}, reply())
        with pytest.raises(QueueFull):
            bus.put_blob(blob, blob_id="b")
        assert raw.keys() == []
    finally:
        raw.config_set("maxmemory", 0)
    bus.publish_plan("r", 0, "print", [sent], {"b": blob}, reply())
    assert claim(bus).message == sent


# ---------------------------------------------------------------- leases


def test_a_dead_workers_unit_is_taken_over_and_counted(bus: Bus) -> None:
    publish(bus)
    first = claim(bus, "w1")
    assert bus.claim_work("w2", 0) is None
    time.sleep(2 * IDLE_S)
    second = claim(bus, "w2")
    assert (second.entry_id, second.deliveries, second.consumer) == (first.entry_id, 2, "w2")
    assert second.message == first.message


def test_a_dead_workers_unit_is_found_behind_many_that_are_held(bus: Bus, raw: redis.Redis) -> None:
    publish(bus, 40)  # the server looks at some ten entries a call
    held = [Group(raw, keys.WORK, keys.WORK_GROUP).claim("w1", 60.0, 0) for _ in range(39)]
    raw.xclaim(keys.WORK, keys.WORK_GROUP, "w1", 0, [held[-1].id], idle=3_600_000, justid=True)
    group = Group(raw, keys.WORK, keys.WORK_GROUP)
    taken, new = group.claim("w2", 60.0, 0), group.claim("w2", 60.0, 0)
    assert (taken.id, taken.body, taken.deliveries) == (held[-1].id, held[-1].body, 2)
    assert new.id not in {entry.id for entry in held} and new.deliveries == 1
    assert group.claim("w2", 60.0, 0) is None


def test_an_answer_is_published_once_by_a_broker_that_forgot_the_scripts(bus: Bus, raw: redis.Redis) -> None:
    publish(bus)
    delivery = claim(bus)
    raw.script_flush()
    assert bus.finish_work(delivery, batch(delivery), pixels(delivery)) is True
    assert bus.get_blob(bus.next_batch("r", "t", 0).message.blob) == pixels(delivery)
    assert bus.next_batch("r", "t", 0) is None and not raw.keys("staged:*")


def test_a_lease_holds_the_claim_without_counting_deliveries(bus: Bus, raw: redis.Redis) -> None:
    publish(bus)
    delivery = claim(bus)
    with bus.lease(delivery) as lease:
        for _ in range(6):
            time.sleep(IDLE_S / 2)
            assert bus.claim_work("w2", 0) is None
        assert not lease.lost.is_set()
    held = raw.xpending_range(keys.WORK, keys.WORK_GROUP, "-", "+", 1)[0]
    assert (held["consumer"], held["times_delivered"]) == (b"w1", 1)
    time.sleep(2 * IDLE_S)
    assert claim(bus, "w2").deliveries == 2  # nobody renews any more


@pytest.mark.parametrize("thief", ["w2", "w1"])
def test_a_lease_is_lost_to_any_other_delivery(bus: Bus, raw: redis.Redis, thief: str) -> None:
    publish(bus)
    delivery = claim(bus)
    expire(raw, delivery)
    stolen = claim(bus, thief)
    with bus.lease(delivery) as lease:
        assert lease.lost.wait(60)
    assert bus.renew(stolen) is True
    bus.finish_work(stolen, batch(stolen), None)
    assert bus.renew(stolen) is False


def test_a_lease_outlives_a_broker_that_is_away(broker_url: str, raw: redis.Redis) -> None:
    bus = Bus(broker_url, BusConfig(lease_idle_s=0.15))
    publish(bus)
    delivery = claim(bus)
    password = raw.config_get("requirepass")["requirepass"]
    with bus.lease(delivery) as lease:
        raw.config_set("requirepass", "changed")
        raw.client_kill_filter(_type="normal", skipme=True)
        time.sleep(0.3)
        raw.config_set("requirepass", password)
        assert not lease.lost.wait(0.3)
        assert raw.xpending_range(keys.WORK, keys.WORK_GROUP, "-", "+", 1)[0]["time_since_delivered"] < 250
    bus.close()


# ---------------------------------------------------------------- one answer a unit


@pytest.mark.parametrize("late_first", [True, False])
def test_two_workers_with_one_unit_publish_one_answer(bus: Bus, raw: redis.Redis, late_first: bool) -> None:
    publish(bus)
    late = claim(bus, "w1")
    expire(raw, late)
    taker = claim(bus, "w2")
    first, second = (late, taker) if late_first else (taker, late)
    assert bus.finish_work(first, batch(first), pixels(first)) is True
    assert bus.finish_work(second, batch(second), pixels(second)) is False
    assert bus.finish_work(first, batch(first), pixels(first)) is True  # a retry after a lost reply
    assert bus.fail_work(second, GenerationFailed("late").to_problem()) is False
    answer = bus.next_batch("r", "t", 0)
    assert (answer.message.worker, answer.message.error) == (first.consumer, None)
    assert codec.decode(bus.get_blob(answer.message.blob))["images"].tolist() == [[[[0] * 3] * 2] * 2]
    assert bus.next_batch("r", "t", 0) is None
    assert bus.depths() == {"waiting": 0, "in_work": 0, "dead": 0}


def test_a_blob_that_is_lost_before_it_is_published_is_written_again(
    bus: Bus, raw: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(bus)
    delivery = claim(bus)
    data = pixels(delivery)
    stage = bus._blobs.stage

    def then_lose(ref, data, token, pipeline):
        staged = stage(ref, data, token, pipeline)
        pipeline.delete(staged)
        return staged

    with monkeypatch.context() as patch:
        patch.setattr(bus._blobs, "stage", then_lose)
        with pytest.raises(BrokerUnavailable, match=r"r\.0\.0"):
            bus.finish_work(delivery, batch(delivery), data)
    assert bus.next_batch("r", "t", 0) is None
    assert bus.finish_work(delivery, batch(delivery), data) is True
    answer = bus.next_batch("r", "t", 0)
    assert bus.get_blob(answer.message.blob) == data
    assert raw.ttl(bus._blobs.key(answer.message.blob)) > keys.STAGED_TTL_S
    assert not raw.keys("staged:*")


def test_finishing_without_memory_changes_nothing_and_may_be_repeated(bus: Bus, raw: redis.Redis) -> None:
    publish(bus)
    delivery = claim(bus)
    raw.config_set("maxmemory", 1)
    try:
        with pytest.raises(QueueFull, match="out of memory"):
            bus.finish_work(delivery, batch(delivery), pixels(delivery))
        assert bus.renew(delivery) is True  # the lease holds while the worker waits
        assert bus.next_batch("r", "t", 0) is None
        assert not raw.exists(keys.done("r.0.0.print")) and raw.xlen(keys.WORK) == 1
    finally:
        raw.config_set("maxmemory", 0)
    assert bus.finish_work(delivery, batch(delivery), pixels(delivery)) is True


def test_a_run_that_was_never_planned_says_that_the_broker_is_out_of_memory(bus: Bus, raw: redis.Redis) -> None:
    raw.config_set("maxmemory", 1)
    try:
        for read in (lambda: bus.next_batch("r", "t", 0), lambda: bus.claim_work("w1", 0), bus.depths):
            with pytest.raises(QueueFull, match="out of memory"):
                read()
    finally:
        raw.config_set("maxmemory", 0)
    assert bus.next_batch("r", "t", 0) is None


def test_a_group_that_another_process_made_meanwhile_is_used(bus: Bus, raw: redis.Redis) -> None:
    raw.xgroup_create(keys.batches("r"), keys.BATCH_GROUP, id="0", mkstream=True)
    group = Group(raw, keys.batches("r"), keys.BATCH_GROUP)
    replies = iter([redis.exceptions.ResponseError("NOGROUP no such group"), None])

    def first_without_the_group() -> str:
        if (error := next(replies)) is not None:
            raise error
        return "read"

    assert group._with_group(first_without_the_group) == "read"


def test_the_trainer_can_drain_a_broker_that_is_out_of_memory(bus: Bus, raw: redis.Redis) -> None:
    publish(bus)
    delivery = claim(bus)
    bus.finish_work(delivery, batch(delivery), pixels(delivery))
    raw.config_set("maxmemory", 1)
    try:
        answer = bus.next_batch("r", "t", 0)
        assert bus.get_blob(answer.message.blob) == pixels(delivery)
        bus.ack_batch(answer)
    finally:
        raw.config_set("maxmemory", 0)
    assert raw.xlen(keys.batches("r")) == 0


# ---------------------------------------------------------------- dead letters


def test_a_failed_unit_is_answered_and_kept(bus: Bus) -> None:
    publish(bus)
    delivery = claim(bus)
    problem = GenerationFailed("the backend raised").to_problem()
    assert bus.fail_work(delivery, problem) is True
    answer = bus.next_batch("r", "t", 0).message
    assert (answer.unit_id, answer.unit, answer.units, answer.model_version) == ("r.0.0.print", 0, 1, 7)
    assert (answer.samples, answer.blob, answer.error, answer.worker) == ([], None, problem, "w1")
    [info] = bus.dead.newest().data
    letter = info.letter
    assert WorkUnit.model_validate_json(letter.entry) == delivery.message
    assert (letter.stream, letter.deliveries, letter.problem) == (keys.WORK, 1, problem)
    assert bus.depths() == {"waiting": 0, "in_work": 0, "dead": 1}


def test_a_unit_that_kills_its_workers_is_given_up_with_an_answer(bus: Bus, raw: redis.Redis) -> None:
    first, second = publish(bus, 2)
    for deliveries in (1, 2):
        delivery = claim(bus)
        assert (delivery.message, delivery.deliveries) == (first, deliveries)
        expire(raw, delivery)
    assert claim(bus).message == second  # the third delivery of the first is one too many
    answer = bus.next_batch("r", "t", 0).message
    assert answer.unit_id == first.id
    assert answer.error["error"]["code"] == "generation_failed"
    assert "delivered 2 times" in answer.error["detail"]
    assert [WorkUnit.model_validate_json(info.letter.entry) for info in bus.dead.newest().data] == [first]


@pytest.mark.parametrize("fields", [{"body": "{not json"}, {"body": '{"id": "x"}'}, {"other": b"\xff"}])
def test_entries_that_cannot_be_parsed_are_dead_letters_and_block_nobody(
    bus: Bus, raw: redis.Redis, fields: dict[str, str | bytes]
) -> None:
    raw.xadd(keys.WORK, fields)
    raw.xadd(keys.batches("r"), fields)
    publish(bus)
    delivery = claim(bus)
    assert delivery.message.id == "r.0.0.print"
    bus.finish_work(delivery, batch(delivery), None)
    assert bus.next_batch("r", "t", 0).message.unit_id == "r.0.0.print"
    letters = [info.letter for info in bus.dead.newest().data]
    assert [letter.stream for letter in letters] == [keys.batches("r"), keys.WORK]  # newest first
    assert {letter.problem["error"]["code"] for letter in letters} == {"invalid_request"}
    assert letters[0].entry == fields.get("body", "")
    assert "not a WorkUnit" in letters[1].problem["detail"]


# ---------------------------------------------------------------- the training side


def test_a_restarted_trainer_gets_back_what_it_had_not_acked(bus: Bus, broker_url: str) -> None:
    publish(bus, 3)
    for _ in range(3):
        delivery = claim(bus)
        bus.finish_work(delivery, batch(delivery), None)
    bus.ack_batch(bus.next_batch("r", "t", 0))
    held = bus.next_batch("r", "t", 0)
    restarted = Bus(broker_url, bus.config)
    again = restarted.next_batch("r", "t", 0)
    assert (again.entry_id, again.message) == (held.entry_id, held.message)
    assert again.deliveries == 2
    assert restarted.next_batch("r", "t", 0).message.unit_id == "r.0.2.print"
    assert restarted.next_batch("r", "t", 0) is None
    restarted.close()


def test_a_trainer_of_another_name_takes_over_after_the_idle_limit(bus: Bus, raw: redis.Redis) -> None:
    publish(bus)
    delivery = claim(bus)
    bus.finish_work(delivery, batch(delivery), None)
    held = bus.next_batch("r", "t1", 0)
    assert bus.next_batch("r", "t2", 0) is None
    expire(raw, held)
    assert bus.next_batch("r", "t2", 0).entry_id == held.entry_id


def test_runs_do_not_see_each_others_batches(bus: Bus) -> None:
    for run in ("a", "b"):
        bus.publish_plan(run, 0, "print", [unit(run=run)], {}, reply(run=run))
        delivery = claim(bus)
        bus.finish_work(delivery, batch(delivery), None)
    assert bus.next_batch("b", "t", 0).message.run == "b"
    assert bus.next_batch("b", "t", 0) is None


def test_a_run_that_starts_anew_finds_nothing_of_the_earlier_one(bus: Bus, raw: redis.Redis) -> None:
    bus.publish_plan("other", 0, "print", [unit(run="other")], {}, reply(run="other"))
    others = claim(bus)
    publish(bus, 3)
    answered, in_work = claim(bus), claim(bus)
    bus.finish_work(answered, batch(answered), None)
    raw.xadd(keys.WORK, {"body": "{not json"})
    bus.forget_run("r")
    assert bus.next_batch("r", "t", 0) is None
    assert raw.xlen(keys.WORK) == 2  # the other run's, and what nobody can parse
    publish(bus, 3)
    assert bus.finish_work(in_work, batch(in_work), None) is False  # asked by the earlier run
    assert bus.next_batch("r", "t", 0) is None
    again = [claim(bus) for _ in range(3)]
    assert [bus.finish_work(delivery, batch(delivery), None) for delivery in (*again, others)] == [True] * 4
    assert [bus.next_batch("r", "t", 0).message.unit for _ in range(3)] == [0, 1, 2]


@pytest.mark.parametrize("memory", [0, 1])
def test_a_gated_unit_goes_behind_all_others_until_its_run_takes_in_a_batch(
    bus: Bus, raw: redis.Redis, memory: int
) -> None:
    publish(bus, 4)
    for _ in range(2):
        delivery = claim(bus)
        assert bus.put_back_if_gated(delivery) is False
        bus.finish_work(delivery, batch(delivery), None)
    raw.config_set("maxmemory", memory)  # 1: out of memory, as a run that nobody reads may leave the broker
    try:
        third = claim(bus)
        expire(raw, third)
        third = claim(bus)
        assert third.deliveries == 2
        body = raw.xrange(keys.WORK, third.entry_id, third.entry_id)[0][1]
        assert bus.put_back_if_gated(third) is True
        assert bus.put_back_if_gated(third) is True  # a retry after a lost reply
        assert raw.xrevrange(keys.WORK, count=1)[0][1] == body
        assert bus.depths() == {"waiting": 2, "in_work": 0, "dead": 0}
        fourth = claim(bus)
        assert fourth.message.unit == 3
        bus.ack_batch(bus.next_batch("r", "t", 0))
    finally:
        raw.config_set("maxmemory", 0)
    assert bus.put_back_if_gated(fourth) is False
    again = claim(bus)
    assert (again.message, again.deliveries) == (third.message, 1)


def test_a_gated_unit_in_other_hands_stays_there(bus: Bus, raw: redis.Redis) -> None:
    publish(bus, 3)
    for _ in range(2):
        delivery = claim(bus)
        bus.finish_work(delivery, batch(delivery), None)
    lost = claim(bus, "w1")
    expire(raw, lost)
    taken = claim(bus, "w2")
    assert bus.put_back_if_gated(lost) is True
    assert bus.renew(taken) is True
    assert raw.xlen(keys.WORK) == 1


def test_forgetting_a_run_also_finds_what_is_put_back_meanwhile(
    bus: Bus, raw: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(bus, 3)
    for _ in range(2):
        delivery = claim(bus)
        bus.finish_work(delivery, batch(delivery), None)
    held = claim(bus)
    peek = bus._work_inbox.peek

    def peek_and_lose() -> list:
        seen = peek()
        bus.put_back_if_gated(held)
        return seen

    monkeypatch.setattr(bus._work_inbox, "peek", peek_and_lose)
    bus.forget_run("r")
    assert raw.xlen(keys.WORK) == 0


def test_forgetting_a_run_leaves_no_blobs_and_touches_no_run_of_a_longer_name(
    broker_url: str, raw: redis.Redis, folder: Path | None
) -> None:
    bus = Bus(broker_url, BusConfig(blob_dir=folder))
    for run in ("a.b", "a.0", "a"):
        init = run.encode()
        units = [unit(run=run, number=n, units=2, init=bus.blob_ref(f"{run}.{n}", init)) for n in range(2)]
        bus.publish_plan(run, 0, "print", units, {f"{run}.{n}": init for n in range(2)}, reply(run=run, units=2))
        delivery = claim(bus)
        assert bus.finish_work(delivery, batch(delivery), pixels(delivery)) is True
        while bus.claim_work("w1", 0) is not None:  # the second unit stays in work
            pass

    def left() -> set[str]:
        files = {path.name for path in folder.iterdir()} if folder is not None else set()
        return {key.decode() for key in raw.scan_iter()} | files

    before = left()
    bus.forget_run("a")
    gone = before - left()
    ours = {keys.done("a.0.0.print"), keys.plan("a", 0), keys.batches("a")}
    init = codec.digest(b"a")[:16]  # of the unit in work, and of the one that is answered
    blobs = {name for name in gone - ours if init in name or name.removeprefix("blob:").startswith("a.0.0.print")}
    assert gone == ours | blobs and len(blobs) == 3
    bus.forget_run("a.0")
    bus.forget_run("a.b")
    assert left() == {keys.WORK}
    bus.close()


def test_a_run_may_be_forgotten_without_the_folder_of_its_blobs(broker_url: str, tmp_path: Path) -> None:
    with_folder, without = Bus(broker_url, BusConfig(blob_dir=tmp_path)), Bus(broker_url, BusConfig())
    publish(with_folder)
    delivery = claim(with_folder)
    with_folder.finish_work(delivery, batch(delivery), pixels(delivery))
    without.forget_run("r")
    assert without.next_batch("r", "t", 0) is None
    assert len(list(tmp_path.iterdir())) == 1  # goes when it is past its life
    with_folder.close()
    without.close()


# ---------------------------------------------------------------- blobs


def test_a_damaged_or_missing_blob_is_told_apart(broker_url: str, raw: redis.Redis, folder: Path | None) -> None:
    bus = Bus(broker_url, BusConfig(blob_dir=folder))
    data = codec.encode({"images": np.zeros((1, 4, 4, 3), np.uint8)})

    def overwrite(ref: BlobRef, content: bytes) -> None:
        if folder is None:
            raw.set(ref.ref.removeprefix("redis:"), content)
        else:
            (folder / ref.ref.removeprefix("file:")).write_bytes(content)

    ref = bus.put_blob(data, blob_id="a/../b")
    assert bus.get_blob(ref) == data
    overwrite(ref, bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(BlobCorrupt, match="sha256"):
        bus.get_blob(ref)
    overwrite(ref, data[:-1])
    with pytest.raises(BlobCorrupt):
        bus.get_blob(ref)
    bus.drop_blob(ref)
    bus.drop_blob(ref)
    with pytest.raises(BlobMissing, match="expired"):
        bus.get_blob(ref)
    bus.close()


@pytest.mark.parametrize("place", ["file:../secret", "file:/etc/passwd", "redis:work", "http://x/y", "file:", ""])
def test_a_reference_out_of_place_is_refused(broker_url: str, tmp_path: Path, place: str) -> None:
    (tmp_path / "secret").write_bytes(b"")
    bus = Bus(broker_url, BusConfig(blob_dir=tmp_path / "blobs"))
    with pytest.raises(BlobCorrupt, match="no place for a blob"):
        bus.get_blob(BlobRef(ref=place, sha256=codec.digest(b""), size=0))
    bus.close()


def test_a_file_blob_without_the_folder_says_what_to_set(bus: Bus) -> None:
    with pytest.raises(ConfigError, match=r"broker\.blob_dir"):
        bus.get_blob(BlobRef(ref="file:x.blob", sha256="", size=0))


def test_blobs_expire(broker_url: str, raw: redis.Redis, tmp_path: Path) -> None:
    on_broker = Bus(broker_url, BusConfig(blob_ttl_s=500))
    ref = on_broker.put_blob(b"x", blob_id="x")
    assert 0 < raw.ttl(ref.ref.removeprefix("redis:")) <= 500
    in_folder = Bus(broker_url, BusConfig(blob_dir=tmp_path, blob_ttl_s=3600))
    old, fresh = in_folder.put_blob(b"old", blob_id="old"), in_folder.put_blob(b"new", blob_id="new")
    (tmp_path / "theirs.txt").write_text("not a blob")
    for name in (old.ref.removeprefix("file:"), "theirs.txt"):
        path = tmp_path / name
        os.utime(path, (0, 0))
    later = Bus(broker_url, BusConfig(blob_dir=tmp_path, blob_ttl_s=3600))
    with pytest.raises(BlobMissing):
        later.get_blob(old)
    assert later.get_blob(fresh) == b"new"
    assert (tmp_path / "theirs.txt").exists()
    for made in (on_broker, in_folder, later):
        made.close()


# ---------------------------------------------------------------- a broker that goes away


def test_a_broker_that_crashes_is_back_on_the_next_call_with_its_entries() -> None:
    with EmbeddedBroker(append_only=True) as broker:
        bus = Bus(broker.url, BusConfig())
        publish(bus, 2)
        held = claim(bus)
        crash(broker.url)
        assert bus.depths() == {"waiting": 1, "in_work": 1, "dead": 0}
        assert bus.finish_work(held, batch(held), pixels(held)) is True
        assert claim(bus).message.unit == 1
        bus.close()


def test_a_broker_that_lost_its_data_serves_on_with_new_groups() -> None:
    with EmbeddedBroker() as broker:
        bus = Bus(broker.url, BusConfig())
        publish(bus)
        held = claim(bus)
        assert bus.next_batch("r", "t", 0) is None
        crash(broker.url)
        assert bus.renew(held) is False
        assert bus.next_batch("r", "t", 0) is None
        publish(bus)
        delivery = claim(bus)
        assert bus.finish_work(delivery, batch(delivery), pixels(delivery)) is True
        assert bus.next_batch("r", "t", 0).message.unit_id == "r.0.0.print"
        bus.close()


def crash(url: str) -> None:
    """SIGKILL to the server; returns once its successor answers."""
    with connect(url) as client:
        before = client.info("server")
        os.kill(before["process_id"], signal.SIGKILL)
        while run_of(client) in (None, before["run_id"]):
            time.sleep(0.02)


def run_of(client: redis.Redis) -> str | None:
    try:
        return client.info("server")["run_id"]
    except redis.exceptions.ConnectionError:
        return None


def test_without_a_broker_every_call_says_where_it_should_be() -> None:
    bus = Bus("redis://:sesame@127.0.0.1:1/0", BusConfig())
    held = Delivery(unit(), "1-0", keys.WORK, 1, "w1")
    calls = [
        lambda: publish(bus),
        lambda: bus.claim_work("w1", 0),
        lambda: bus.finish_work(held, batch(held), b"x"),
        lambda: bus.fail_work(held, {}),
        lambda: bus.renew(held),
        lambda: bus.next_batch("r", "t", 0),
        lambda: bus.put_back_if_gated(held),
        lambda: bus.put_blob(b"x", blob_id="x"),
        lambda: bus.depths(),
        lambda: bus.dead.newest(),
    ]
    for call in calls:
        with pytest.raises(BrokerUnavailable, match=r"127\.0\.0\.1:1 .*start it") as refused:
            call()
        assert "sesame" not in refused.value.message
    bus.close()
