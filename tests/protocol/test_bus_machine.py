"""The queue under random histories: every published unit gets exactly one answer for each time that it was asked for,
whoever dies when."""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from protocol import codec, keys
from protocol.broker import connect
from protocol.bus import Bus, BusConfig, Delivery
from protocol.entries import SampleBatch, WorkUnit
from protocol.errors import GenerationFailed, QueueFull, UnknownDeadLetter
from protocol.messages import FeedbackAccepted
from tests.protocol.messages_to_send import batch, pixels, reply, unit

WORKERS = st.sampled_from(["w1", "w2", "w3"])
TRAINERS = st.sampled_from(["t1", "t2"])
CONFIG = BusConfig(max_deliveries=2, work_gate=6, batch_gate=2)


class Queue(RuleBasedStateMachine):
    url = ""
    held = Bundle("held")  # deliveries some worker has, also those it lost meanwhile
    batches = Bundle("batches")  # deliveries the trainer has not acked

    def __init__(self) -> None:
        super().__init__()
        self.raw: redis.Redis = connect(self.url)
        self.raw.flushall()
        self.bus = Bus(self.url, CONFIG)
        self.published: dict[str, WorkUnit] = {}
        self.answers: dict[str, dict[str, bool]] = {}  # unit id -> entry id of a batch -> whether it is an error
        self.asked: Counter[str] = Counter()  # unit id -> how often: again after a retry, or when its answer was lost
        self.winners: dict[str, str] = {}  # unit id -> the delivery that was told it published
        self.feedbacks = 0

    @rule(count=st.integers(1, 4))
    def publish(self, count: int) -> None:
        units = [unit(feedback=self.feedbacks, number=number, units=count) for number in range(count)]
        waiting = self.raw.xlen(keys.WORK)

        def send() -> FeedbackAccepted:
            return self.bus.publish_plan("r", self.feedbacks, "f", units, {}, reply(units=count))

        if waiting and waiting + count > CONFIG.work_gate:
            with pytest.raises(QueueFull):
                send()
            return
        assert send() == send() == reply(units=count)  # the second is a repetition
        self.published |= {one.id: one for one in units}
        self.asked.update(one.id for one in units)
        self.feedbacks += 1

    @rule(target=held, worker=WORKERS)
    def claim(self, worker: str):
        delivery = self.bus.claim_work(worker, 0)
        if delivery is None:
            return multiple()
        assert delivery.message.model_copy(update={"attempt": 1}) == self.published[delivery.message.id]
        assert 1 <= delivery.deliveries <= CONFIG.max_deliveries
        return delivery

    @rule(delivery=held)
    def die(self, delivery: Delivery[WorkUnit]) -> None:
        """The worker stops renewing; the delivery stays in `held`, since it may only be slow."""
        if self.bus.renew(delivery):
            arguments = (keys.WORK, keys.WORK_GROUP, delivery.consumer, 0, [delivery.entry_id])
            self.raw.xclaim(*arguments, idle=3_600_000, justid=True)

    @rule(delivery=held)
    def release(self, delivery: Delivery[WorkUnit]) -> None:
        """An orderly shutdown: the unit is there at once, for anybody, and as often delivered as before."""
        ours = self.bus.renew(delivery)
        self.bus.release(delivery)
        assert self.bus.renew(delivery) is False
        if ours:
            (pending,) = self.raw.xpending_range(
                keys.WORK, keys.WORK_GROUP, delivery.entry_id, delivery.entry_id, 1, idle=3_600_000
            )
            assert pending["times_delivered"] == delivery.deliveries - 1

    @rule()
    def retry_newest(self) -> None:
        for info in self.bus.dead.newest(1).data:
            if self.raw.xlen(keys.WORK) >= CONFIG.work_gate:
                with pytest.raises(QueueFull):
                    self.bus.dead.retry(info.id)
                return
            self.bus.dead.retry(info.id)
            with pytest.raises(UnknownDeadLetter):
                self.bus.dead.retry(info.id)
            self.ask_anew(info.unit_id)

    @rule(delivery=consumes(batches))
    def lose(self, delivery: Delivery[SampleBatch]) -> None:
        """The trainer finds that it cannot read a batch."""
        if delivery.message.error is not None:
            return
        theirs = self.raw.xrange(delivery.stream, delivery.entry_id, delivery.entry_id) == []
        for _ in range(2):  # the second is a repetition
            self.bus.lost.ask_again(delivery)
        if not theirs:
            del self.answers[delivery.message.unit_id][delivery.entry_id]
            self.ask_anew(delivery.message.unit_id)
            self.asked[delivery.message.unit_id] -= 1

    def ask_anew(self, unit_id: str) -> None:
        self.asked[unit_id] += 1
        self.winners.pop(unit_id, None)

    @rule(delivery=held)
    def put_back(self, delivery: Delivery[WorkUnit]) -> None:
        ours, entries = self.bus.renew(delivery), self.raw.xlen(keys.WORK)
        gated = self.raw.xlen(keys.batches("r")) >= CONFIG.batch_gate
        assert self.bus.put_back_if_gated(delivery) is (gated or not ours)
        assert self.bus.renew(delivery) is (ours and not gated)
        assert self.raw.xlen(keys.WORK) == entries

    @rule(delivery=held)
    def finish(self, delivery: Delivery[WorkUnit]) -> None:
        first = self.bus.finish_work(delivery, batch(delivery), pixels(delivery))
        assert self.bus.finish_work(delivery, batch(delivery), pixels(delivery)) is first
        assert self.bus.renew(delivery) is False
        if first:
            assert self.winners.setdefault(delivery.message.id, delivery.token) == delivery.token

    @rule(delivery=consumes(held))
    def fail(self, delivery: Delivery[WorkUnit]) -> None:
        self.bus.fail_work(delivery, GenerationFailed("no").to_problem())

    @rule(target=batches, trainer=TRAINERS)
    def admit(self, trainer: str):
        delivery = self.bus.next_batch("r", trainer, 0)
        return multiple() if delivery is None else self.seen(delivery)

    @rule(delivery=consumes(batches))
    def ack(self, delivery: Delivery[SampleBatch]) -> None:
        self.bus.ack_batch(delivery)
        self.bus.ack_batch(delivery)

    @rule()
    def restart(self) -> None:
        self.bus.close()
        self.bus = Bus(self.url, CONFIG)

    def seen(self, delivery: Delivery[SampleBatch]) -> Delivery[SampleBatch]:
        answer = delivery.message
        answers = self.answers.setdefault(answer.unit_id, {})
        answers[delivery.entry_id] = answer.error is not None
        assert len(answers) <= self.asked[answer.unit_id], "answered twice"
        if answer.error is None:
            assert codec.decode(self.bus.get_blob(answer.blob))["images"][0, 0, 0, 0] == answer.unit
        return delivery

    @invariant()
    def every_unit_is_waiting_or_answered(self) -> None:
        waiting = {WorkUnit.model_validate_json(body[b"body"]).id for _, body in self.raw.xrange(keys.WORK)}
        done = {key.decode().removeprefix(keys.done("")) for key in self.raw.scan_iter(keys.done("*"))}
        assert waiting | done == self.published.keys()
        depths = self.bus.depths()
        assert depths["waiting"] + depths["in_work"] == self.raw.xlen(keys.WORK)

    def teardown(self) -> None:
        """Everybody dies; one last worker and one last trainer clear up, and the books must balance."""
        self.expire_all(keys.WORK, keys.WORK_GROUP)
        while (work := self.bus.claim_work("last", 0)) is not None:
            self.bus.finish_work(work, batch(work), pixels(work))
        self.expire_all(keys.batches("r"), keys.BATCH_GROUP)
        while (answer := self.bus.next_batch("r", "last", 0)) is not None:
            self.seen(answer)
            self.bus.ack_batch(answer)
        assert self.answers.keys() == self.published.keys()
        for unit_id, answers in self.answers.items():
            assert list(answers.values()) in ([True] * (self.asked[unit_id] - 1) + [last] for last in (True, False))
        failed = [unit_id for unit_id, answers in self.answers.items() if all(answers.values())]
        assert sorted(info.unit_id for info in self.bus.dead.newest().data) == sorted(failed)
        assert self.raw.xlen(keys.WORK) == self.raw.xlen(keys.batches("r")) == 0
        assert list(self.raw.scan_iter(keys.blob("*"))) == []
        self.raw.close()
        self.bus.close()

    def expire_all(self, stream: str, group: str) -> None:
        if self.feedbacks and self.raw.exists(stream) and self.raw.xinfo_groups(stream):
            for entry in self.raw.xpending_range(stream, group, "-", "+", 1000):
                self.raw.xclaim(stream, group, "dead", 0, [entry["message_id"]], idle=3_600_000, justid=True)


def test_any_history_loses_nothing_and_answers_nothing_twice(broker_url: str) -> None:
    Queue.url = broker_url
    limits = settings(
        max_examples=20, stateful_step_count=30, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    run_state_machine_as_test(Queue, settings=limits)
