"""The feed against a real broker, with the service's HTTP replaced at the transport and its work done by the test."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from agent.planner import PlannerConfig, plan
from protocol import config
from protocol.broker import EmbeddedBroker, connect
from protocol.bus import Bus, BusConfig
from protocol.client import GeneratorClient
from protocol.entries import SampleBatch, WorkUnit
from protocol.errors import BrokerFull, BrokerUnavailable, QueueFull, UnknownClass
from protocol.messages import Feedback, FeedbackAccepted, MarginalSample, WeightsRef
from tests.trainer.test_durable import FULL, needs_full_device
from tests.trainer.test_pool import make_batch
from trainer import record
from trainer.books import open_books
from trainer.feed import ATTEMPTS, Feed
from trainer.journal import Journal
from trainer.pool import Pool
from trainer.settings import ServiceConfig, TrainerConfig

WEIGHTS = WeightsRef(name="w", version=1, digest="d")


def question(number: int, sources: int = 2) -> Feedback:
    samples = [MarginalSample(sample_id=f"s{i}", label=0, class_name="c", score=0.1) for i in range(sources)]
    return Feedback(run="r", feedback=number, model_version=0, samples=samples)


class Generator:
    """The service's side: plans what is posted, and answers work units when told to."""

    def __init__(self, url: str):
        self.bus = Bus(url, BusConfig())
        self.posts: list[tuple[int, float]] = []  # feedback, time
        self.refuse: Callable[[], httpx.Response | None] = lambda: None
        self.away = False

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if self.away:
            raise httpx.ConnectError("connection refused")
        if request.url.path != "/v1/feedback":
            return httpx.Response(200, json={"status": "ready"})
        feedback = Feedback.model_validate_json(request.content)
        self.posts.append((feedback.feedback, time.monotonic()))
        if (refusal := self.refuse()) is not None:
            return refusal
        config = PlannerConfig(images_per_sample=1, unit_size=1)
        units = plan(feedback, config, WEIGHTS, ["c"], lambda name: True)
        reply = FeedbackAccepted(
            run="r", feedback=feedback.feedback, units=len(units), samples=len(units), weights=WEIGHTS
        )
        reply = self.bus.publish_plan("r", feedback.feedback, feedback.fingerprint(), units, {}, reply)
        return httpx.Response(202, json=reply.model_dump())

    def work(self, block_s: float = 5.0, weights: WeightsRef = WEIGHTS, **of_samples: object) -> WorkUnit:
        """Answer one unit, with samples of these weights, and with these fields."""
        delivery = self.bus.claim_work("g", block_s)
        assert delivery is not None
        unit = delivery.message
        batch, data = make_batch(unit.feedback, unit.unit, unit.units, [unit.rows[0].source_id])
        samples = [sample.model_copy(update=of_samples) for sample in batch.samples]
        filled = batch.model_copy(update={"samples": samples}).model_dump()
        filled |= {"unit_id": unit.id, "run": unit.run, "weights": weights}
        self.bus.finish_work(delivery, SampleBatch.model_validate(filled), data)
        return unit


@pytest.fixture
def broker() -> Iterator[str]:
    with EmbeddedBroker() as server:
        yield server.url


@pytest.fixture
def generator(broker: str) -> Iterator[Generator]:
    made = Generator(broker)
    yield made
    made.bus.close()


@pytest.fixture
def make_feed(tmp_path: Path, broker: str, generator: Generator) -> Iterator[Callable[..., Feed]]:
    journal = Journal(tmp_path)
    client = GeneratorClient("http://127.0.0.1:9", transport=httpx.MockTransport(generator), retries=0)
    bus = Bus(broker, BusConfig())

    def make(staleness: int = 0, **settings) -> Feed:
        config = ServiceConfig.model_validate({"answer_timeout_s": 30.0, "outage_grace_s": 0.2} | settings)
        return Feed(config, client, bus, Pool(tmp_path / "batches"), journal, "r", staleness, tmp_path)

    yield make
    bus.close()
    client.close()
    journal.close()


def events(folder: Path) -> list[str]:
    return [row["event"] for row in record.rows(folder / "events.jsonl")]


def later(work: Callable[[], None], delay_s: float = 0.0) -> threading.Timer:
    timer = threading.Timer(delay_s, work)
    timer.start()
    return timer


def wait_until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.01)


def test_take_waits_for_every_unit(make_feed, generator: Generator):
    with make_feed() as feed:
        feed.post(question(0))
        generator.work()
        timer = later(generator.work, 0.3)
        assert [candidate.sample.source_id for candidate in feed.take(0)] == ["s0", "s1"]
        timer.join()


def test_late_answers_are_not_waited_for_for_ever_and_are_stale_next_time(
    tmp_path: Path, make_feed, generator: Generator
):
    with make_feed(answer_timeout_s=0.3) as feed:
        feed.post(question(0))
        generator.work()
        wait_until(lambda: feed.pool.unused == 1)
        assert len(feed.take(0)) == 1
        assert events(tmp_path) == ["late"]
        generator.work()
        wait_until(lambda: feed.pool.unused == 1)
        assert feed.take(1) == []
        assert feed.pool.stale == 1


def test_what_a_broker_lost_is_asked_again(tmp_path: Path, broker: str, make_feed, generator: Generator):
    """The server is killed after it accepted the work; its watcher starts it again, empty."""
    with make_feed() as feed:
        feed.post(question(0))
        with connect(broker) as client:
            os.kill(client.info("server")["process_id"], signal.SIGKILL)
        wait_until(lambda: len(generator.posts) == 2)
        generator.work()
        generator.work()
        assert len(feed.take(0)) == 2
    assert "late" not in events(tmp_path)


@pytest.mark.parametrize("step", ["get_blob", "ack_batch"])
def test_an_answer_in_hand_when_the_broker_goes_away_comes_again_long_before_its_lease_ends(
    tmp_path: Path, make_feed, generator: Generator, monkeypatch: pytest.MonkeyPatch, step: str
):
    work, failures = getattr(Bus, step), [BrokerUnavailable("the connection broke off")]

    def fail_once(bus: Bus, *arguments):
        if failures:
            raise failures.pop()
        return work(bus, *arguments)

    monkeypatch.setattr(Bus, step, fail_once)
    with make_feed() as feed:
        feed.post(question(0))
        generator.work()
        generator.work()
        wait_until(lambda: generator.bus.batches_waiting("r") == 0, BusConfig().lease_idle_s / 2)
        assert len(feed.take(0)) == 2 and not failures


def test_waiting_for_an_outage_to_end_is_not_lateness(tmp_path: Path, make_feed, generator: Generator):
    with make_feed(on_outage="wait", answer_timeout_s=2.0, outage_grace_s=0.1) as feed:
        generator.away = True
        feed.post(question(0))

        def come_back() -> None:
            generator.away = False
            generator.work()
            generator.work()

        timer = later(come_back, 3.0)
        assert len(feed.take(0)) == 2
        timer.join()
    assert events(tmp_path) == ["outage", "recovery"]


def test_a_broken_disk_stops_the_run_and_not_only_the_thread(make_feed, generator: Generator, monkeypatch):
    def broken(*_: object) -> bool:
        raise OSError(errno.EIO, "input/output error")

    with make_feed() as feed:
        monkeypatch.setattr(feed.pool, "admit", broken)
        feed.post(question(0))
        generator.work()
        with pytest.raises(OSError, match="input/output error"):
            feed.take(0)


def test_retry_after_is_respected(make_feed, generator: Generator):
    def full() -> httpx.Response | None:
        if len(generator.posts) > 1:
            return None
        error = QueueFull("full", retry_after=1.0)
        return httpx.Response(429, json=error.to_problem(), headers={"Retry-After": "1"})

    generator.refuse = full
    with make_feed() as feed:
        feed.post(question(0))
        wait_until(lambda: len(generator.posts) == 2)
        (_, first), (_, second) = generator.posts
        assert second - first >= 1.0
        generator.work()
        generator.work()
        assert len(feed.take(0)) == 2


def test_a_refusal_for_good_is_raised(make_feed, generator: Generator):
    generator.refuse = lambda: httpx.Response(422, json=UnknownClass("no such class").to_problem())
    with make_feed() as feed, pytest.raises(UnknownClass, match="no such class"):
        feed.post(question(0))


def test_a_resumed_run_asks_what_it_waits_for(make_feed, generator: Generator, broker: str):
    """K = 1, stopped within iteration 3; the broker is another, empty one by then."""
    with make_feed(staleness=1) as feed:
        for number in (1, 2, 3):
            feed.post(question(number))
        for _ in range(2):
            generator.work()  # the answers to feedback 1
        wait_until(lambda: feed.pool.complete(1))
    with connect(broker) as client:
        client.flushall()
    generator.posts.clear()
    resumed = make_feed(staleness=1)
    resumed.resume(3)
    with resumed:
        wait_until(lambda: len(generator.posts) == 2)
        assert [number for number, _ in generator.posts] == [2, 3]


def test_an_answer_to_another_question_is_not_taken(tmp_path: Path, make_feed, generator: Generator):
    """An earlier run of this name asked something else, and its answer is still on its way."""
    other = question(0, sources=1)
    units = plan(other, PlannerConfig(images_per_sample=1), WEIGHTS, ["c"], lambda name: True)
    reply = FeedbackAccepted(run="r", feedback=0, units=1, samples=1, weights=WEIGHTS)
    generator.bus.publish_plan("r", 99, "x", units, {}, reply)
    with make_feed() as feed:
        feed.post(question(0))
        for _ in range(3):
            generator.work()
        assert len(feed.take(0)) == 2
    assert events(tmp_path) == ["foreign"]


# ---------------------------------------------------------------- nothing is lost


@needs_full_device
def test_a_full_disk_is_waited_for_and_nothing_is_lost(tmp_path: Path, make_feed, generator: Generator, monkeypatch):
    """There is no room for the first batch, twice; the run waits longer than answers may be late."""
    monkeypatch.setattr("trainer.outage.RETRY_S", 0.5)
    partial = tmp_path / "batches" / "000000-000000.safetensors.partial"
    with make_feed(answer_timeout_s=0.2) as feed:
        partial.symlink_to(FULL)
        feed.post(question(0))
        generator.work()
        wait_until(lambda: events(tmp_path) == ["disk_full"])
        partial.symlink_to(FULL)  # the writer that failed removed it
        generator.work()
        assert len(feed.take(0)) == 2
    assert events(tmp_path) == ["disk_full", "disk_recovered"]
    assert generator.bus.batches_waiting("r") == 0


@needs_full_device
def test_a_question_is_not_sent_before_it_is_on_the_disk(tmp_path: Path, make_feed, generator: Generator, monkeypatch):
    monkeypatch.setattr("trainer.outage.RETRY_S", 0.1)
    with make_feed() as feed:
        for folder in ("feedback", "accepted"):
            (tmp_path / folder / "000000.json.partial").symlink_to(FULL)
        feed.post(question(0))
        assert (tmp_path / "feedback" / "000000.json").exists()
        wait_until(lambda: (tmp_path / "accepted" / "000000.json").exists())
    assert events(tmp_path) == ["disk_full", "disk_recovered"] * 2


def test_a_broker_without_memory_is_told_once(tmp_path: Path, broker: str, make_feed, generator: Generator):
    with connect(broker) as client, make_feed() as feed:
        client.config_set("maxmemory", 1)

        def refuse() -> httpx.Response | None:
            error = BrokerFull("the broker is out of memory", retry_after=0.1)
            return httpx.Response(429, json=error.to_problem()) if client.config_get()["maxmemory"] != "0" else None

        generator.refuse = refuse
        feed.post(question(0))
        wait_until(lambda: len(generator.posts) >= 3)
        assert events(tmp_path) == ["broker_full"]
        client.config_set("maxmemory", 0)
        generator.work()
        generator.work()
        assert len(feed.take(0)) == 2
    assert events(tmp_path) == ["broker_full", "broker_recovered"]


@pytest.mark.parametrize("how", ["blob_missing", "blob_corrupt"])
def test_an_answer_that_cannot_be_read_is_asked_for_again_and_at_last_given_up(
    tmp_path: Path, broker: str, make_feed, generator: Generator, how: str
):
    """The pixels are lost while no trainer runs, again and again."""
    make_feed().post(question(0, sources=1))
    with connect(broker) as client:
        for attempt in range(1, ATTEMPTS + 1):
            generator.work()
            for key in client.scan_iter("blob:*"):
                client.delete(key) if how == "blob_missing" else client.setrange(key, 100, b"?")
            with make_feed() as feed:
                wait_until(lambda attempt=attempt: events(tmp_path) == [how] * attempt)
                wait_until(lambda: generator.bus.batches_waiting("r") == 0)
                assert feed.pool.complete(0) is (attempt == ATTEMPTS)
    (dead,) = generator.bus.dead.newest().data
    assert dead.letter.problem["error"]["code"] == how
    with make_feed() as feed:
        assert feed.take(0) == []
        generator.bus.dead.retry(dead.id)
        generator.work()
        wait_until(lambda: feed.pool.unused == 1)
        assert [candidate.sample.source_id for candidate in feed.take(0)] == ["s0"]


def test_what_was_admitted_is_not_asked_for_again(tmp_path: Path, broker: str, make_feed, generator: Generator):
    """The trainer dies between admission and acknowledgement, and the pixels expire before it is back."""
    first = make_feed()
    first.post(question(0, sources=1))
    generator.work()
    bus = Bus(broker, BusConfig())
    delivery = bus.next_batch("r", "trainer")
    assert delivery is not None
    first.pool.admit(delivery.message, bus.get_blob(delivery.message.blob))
    bus.drop_blob(delivery.message.blob)
    bus.close()
    with make_feed() as feed:
        wait_until(lambda: generator.bus.batches_waiting("r") == 0)
        assert len(feed.take(0)) == 1
    assert events(tmp_path) == []


def test_samples_of_other_weights_than_promised_are_refused_and_asked_for_again(
    tmp_path: Path, make_feed, generator: Generator
):
    """Also by a resumed run, to which nothing is promised anew before they come."""
    make_feed().post(question(0, sources=1))
    generator.work(weights=WEIGHTS.model_copy(update={"version": 2}))
    generator.away = True
    with make_feed() as feed:
        wait_until(lambda: events(tmp_path) == ["wrong_weights"])
        assert generator.work().weights == WEIGHTS
        wait_until(lambda: feed.pool.unused == 1)
    assert "made with w@2, and w@1 was promised" in (tmp_path / "events.jsonl").read_text()


@pytest.mark.parametrize("fields", [{"label": 1}, {"label": 7, "class_name": "new"}, {"source_id": "stranger"}])
def test_samples_of_another_identity_are_asked_for_again_and_at_last_given_up(
    tmp_path: Path, broker: str, make_feed, generator: Generator, fields: dict
):
    with make_feed() as feed:
        feed.post(question(0, sources=2))
        generator.work()
        for attempt in range(1, ATTEMPTS + 1):
            generator.work(**fields)
            wait_until(lambda attempt=attempt: events(tmp_path) == ["wrong_identity"] * attempt)
        assert [candidate.sample.source_id for candidate in feed.take(0)] == ["s0"]
    (dead,) = generator.bus.dead.newest().data
    assert dead.letter.problem["error"]["code"] == "wrong_identity"
    settings = {"run": "r", "mode": "sync", "dataset": {"root": tmp_path}}
    config.write_resolved({"trainer": TrainerConfig.model_validate(settings)}, tmp_path / "settings.toml")
    books = open_books(tmp_path, broker)
    assert (books.fates["dead"], books.fates["unused"], books.outstanding) == (1, 1, {})
    assert (books.requested, books.problems) == (2, [])
