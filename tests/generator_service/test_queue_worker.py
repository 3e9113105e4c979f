"""Feedback in, batches out: HTTP, planner, broker, engine and publication together, on a real broker."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from agent.settings import AgentConfig
from generator_service.backends.interface import Row, Sampling
from generator_service.real_images import resized
from generator_service.service import Service
from protocol import codec, keys
from protocol.broker import EmbeddedBroker, connect
from protocol.bus import Bus, Delivery, QueueConfig
from protocol.dataset import Dataset, DatasetConfig
from protocol.entries import SampleBatch, WorkRow, WorkUnit
from protocol.messages import FeedbackAccepted, WeightsRef
from tests.generator_service.conftest import scripted
from tests.generator_service.tiny_dit import full, open_backend
from tests.generator_service.tiny_service import make_service, served, started

RUN = "run-1"


@pytest.fixture
def bus(queue_url: str) -> Iterator[Bus]:
    bus = Bus(queue_url, QueueConfig(url=queue_url, lease_idle_s=1.0))
    yield bus
    bus.close()


@pytest.fixture
def service(tmp_path: Path, dit_settings: dict, queue_url: str) -> Iterator[Service]:
    with started(make_service(tmp_path, queue_url, **dit_settings)) as service:
        yield service


@pytest.fixture
def http(service: Service) -> Iterator[httpx.Client]:
    with served(service) as url, httpx.Client(base_url=url) as client:
        yield client


@pytest.fixture(scope="module")
def shared(tmp_path_factory, checkpoint: Path, dataset_root: Path) -> Iterator[httpx.Client]:
    """One service for the tests that publish nothing, on a broker of its own."""
    settings = {"dit": {"checkpoint": str(checkpoint), "device": "cpu"}, "dataset": {"root": dataset_root}}
    with (
        EmbeddedBroker() as broker,
        started(make_service(tmp_path_factory.mktemp("shared"), broker.url, **settings)) as service,
        served(service) as url,
        httpx.Client(base_url=url) as client,
    ):
        yield client


def batches(bus: Bus, count: int, run: str = RUN) -> list[SampleBatch]:
    """The next `count` batches in the units' order, acked; `images` has their pixels."""
    found = []
    while len(found) < count:
        if (delivery := bus.next_batch(run, "test", 1.0)) is not None:
            batch = delivery.message
            if batch.blob is not None:
                PIXELS[batch.blob.ref] = codec.decode(bus.get_blob(batch.blob))["images"]
            bus.ack_batch(delivery)
            found.append(batch)
    return sorted(found, key=lambda batch: batch.unit)


PIXELS: dict[str, np.ndarray] = {}  # blob reference -> what it held before its batch was acked


def images(batch: SampleBatch) -> np.ndarray:
    return PIXELS[batch.blob.ref]


def marginal(dataset: Dataset, index: int, **fields) -> dict:
    entry = dataset.samples[index]
    return {"sample_id": entry.id, "label": entry.label, "class_name": entry.class_name, "score": 0.1} | fields


def feedback(*samples: dict, **fields) -> dict:
    return {"run": RUN, "feedback": 3, "model_version": 7, "samples": list(samples)} | fields


@pytest.fixture
def dataset(dataset_root: Path) -> Dataset:
    return Dataset.open(DatasetConfig(root=dataset_root))


def work_unit(unit: int, weights: WeightsRef, *rows: WorkRow, **fields) -> WorkUnit:
    values = {
        "id": f"{fields.get('run', RUN)}.0.{unit}.x",
        "run": RUN,
        "feedback": 0,
        "unit": unit,
        "units": 1,
        "model_version": 0,
        "weights": weights,
        "steps": 4,
        "scheduler": "ddim",
        "strength": 1.0,
        "rows": list(rows),
    }
    return WorkUnit(**(values | fields))


def work_row(number: int, **fields) -> WorkRow:
    values = {
        "sample_id": f"{number:032x}",
        "source_id": "class:alpha",
        "index": number,
        "seed": number,
        "label": 0,
        "class_name": "alpha",
        "prompt": "alpha",
        "guidance_scale": 2.0,
    }
    return WorkRow(**(values | fields))


def publish(bus: Bus, *units: WorkUnit, number: int = 0) -> None:
    run = units[0].run
    reply = FeedbackAccepted(run=run, feedback=number, units=len(units), samples=1, weights=units[0].weights)
    bus.publish_plan(run, number, f"fingerprint-{number}", units, {}, reply)


# ---------------------------------------------------------------- the whole way


def test_feedback_becomes_batches_with_provenance(http, service: Service, bus: Bus, dataset: Dataset):
    answer = http.post("/v1/feedback", json=feedback(marginal(dataset, 0), marginal(dataset, 5), marginal(dataset, 9)))
    assert answer.status_code == 202, answer.text
    accepted = FeedbackAccepted.model_validate_json(answer.content)
    assert (accepted.units, accepted.samples) == (2, 6)
    found = batches(bus, 2)
    assert [len(batch.samples) for batch in found] == [4, 2]
    for batch in found:
        assert (batch.run, batch.feedback, batch.model_version, batch.error) == (RUN, 3, 7, None)
        assert batch.started <= batch.finished and batch.weights == accepted.weights == service.loaded.weights.base.ref
        assert images(batch).shape == (len(batch.samples), 8, 8, 3)
        for sample in batch.samples:
            assert (sample.strength, sample.steps, sample.init_id) == (0.5, 4, sample.source_id)
            assert sample.nearest_real is not None and sample.weights == batch.weights
    sources = [sample.source_id for batch in found for sample in batch.samples]
    assert sources == [dataset.samples[index].id for index in (0, 0, 5, 5, 9, 9)]
    stored = http.get(f"/v1/samples/{found[0].samples[0].id}").json()
    assert stored == found[0].samples[0].model_dump(mode="json")
    problem = http.get(f"/v1/samples/{found[0].samples[0].id}/image")
    assert (problem.status_code, problem.json()["error"]["code"]) == (404, "unknown_sample")


def test_queued_pixels_are_the_backends_own_to_the_bit(service: Service, bus: Bus, dataset: Dataset):
    """A unit is one batch of its own: the same rows given to the backend directly make the same pixels."""
    init = dataset.samples[2].id
    rows = [work_row(1), work_row(2, class_name="beta", label=1), work_row(3, init_id=init)]
    publish(bus, work_unit(0, service.loaded.weights.base.ref, *rows, strength=0.5))
    (batch,) = batches(bus, 1)
    expected = [
        Row(1, 0, 2.0, "alpha"),
        Row(2, 1, 2.0, "alpha"),
        Row(3, 0, 2.0, "alpha", image=dataset.image(2)),
    ]
    sampling = Sampling(4, "ddim", 0.5, guided=True)
    direct = service.loaded.backend.generate(service.loaded.weights.base, expected, sampling)
    np.testing.assert_array_equal(images(batch), direct)


def test_pixels_that_travel_with_the_feedback_give_the_same_samples(http, bus: Bus, dataset: Dataset):
    pixels = codec.image_to_base64(dataset.image(4))
    assert http.post("/v1/feedback", json=feedback(marginal(dataset, 4))).status_code == 202
    (mounted,) = batches(bus, 1)
    bus.forget_run(RUN)  # the same run, so the same ids and seeds
    assert http.post("/v1/feedback", json=feedback(marginal(dataset, 4, pixels=pixels))).status_code == 202
    (carried,) = batches(bus, 1)
    assert [sample.init_id for sample in carried.samples] == [None, None]
    assert [sample.id for sample in carried.samples] == [sample.id for sample in mounted.samples]
    assert (images(carried) == images(mounted)).all()


def test_carried_pixels_are_resized_as_mounted_ones_are(checkpoint: Path):
    image = np.random.default_rng(0).integers(0, 256, (32, 20, 3), dtype=np.uint8)
    backend = open_backend(checkpoint)
    row = {"seed": 1, "label": 0}
    sampling = Sampling(steps=4, scheduler="ddim", strength=0.5)
    mounted, carried = (
        backend.generate(full(backend), [Row(image=picture, **row)], sampling)
        for picture in (image, resized(image, backend.native_size()))
    )
    assert (mounted == carried).all()


def test_the_same_feedback_again_is_planned_once_and_another_conflicts(http, bus: Bus, dataset: Dataset):
    first = http.post("/v1/feedback", json=feedback(marginal(dataset, 0)))
    again = http.post("/v1/feedback", json=feedback(marginal(dataset, 0)))
    assert first.json() == again.json()
    other = http.post("/v1/feedback", json=feedback(marginal(dataset, 1)))
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_conflict")
    assert len(batches(bus, 1)) == 1
    assert bus.next_batch(RUN, "test", 0.1) is None


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"sample_id": "nope"}, 422, "unknown_source"),
        ({"class_name": "zebra"}, 422, "unknown_class"),
        ({"label": 99}, 422, "unknown_class"),
        ({"label": 1}, 422, "unknown_class"),
        ({"label": -1}, 422, "invalid_request"),
        ({"score": "low"}, 422, "invalid_request"),
        ({"pixels": "AAAA"}, 422, "invalid_image"),
    ],
    ids=str,
)
def test_wrong_feedback_is_refused_whole(shared, dataset: Dataset, change: dict, status: int, code: str):
    body = feedback(marginal(dataset, 0), marginal(dataset, 1) | change)
    answer = shared.post("/v1/feedback", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert 'onthefly_broker_entries{stream="waiting"} 0.0' in shared.get("/metrics").text


def test_unknown_weights_in_feedback_are_refused(shared, dataset: Dataset):
    answer = shared.post("/v1/feedback", json=feedback(marginal(dataset, 0), model="nope"))
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_weights")


def test_metrics_show_the_broker(shared):
    page = shared.get("/metrics").text
    assert 'onthefly_broker_entries{stream="dead"} 0.0' in page


# ---------------------------------------------------------------- failures


@pytest.mark.parametrize(
    ("row", "unit", "code"),
    [
        ({"class_name": "zebra"}, {}, "unknown_class"),
        ({"init_id": "nope"}, {"strength": 0.5}, "unknown_source"),
        ({}, {"weights": "nope"}, "unknown_weights"),
        ({}, {"weights": "base"}, "weights_corrupt"),
    ],
    ids=str,
)
def test_a_unit_that_cannot_be_made_is_answered_and_kept_as_a_dead_letter(service, bus: Bus, row, unit, code):
    weights = service.loaded.weights.base.ref
    wrong = WeightsRef(name=unit["weights"], version=1, digest="0") if "weights" in unit else weights
    strength = unit.get("strength", 1.0)
    publish(bus, work_unit(0, wrong, work_row(1, **row), strength=strength), work_unit(1, weights, work_row(2)))
    failed, made = batches(bus, 2)
    assert (failed.error["error"]["code"], failed.samples, failed.blob) == (code, [], None)
    assert made.error is None and len(made.samples) == 1
    (info,) = bus.dead.newest().data
    assert info.letter.problem == failed.error
    assert bus.depths() == {"waiting": 0, "in_work": 0, "dead": 1}


@pytest.fixture
def held(tmp_path: Path, scripted_settings: dict, queue_url: str) -> Iterator[Service]:
    """A scripted service whose denoising waits for the test."""
    with started(make_service(tmp_path, queue_url, **scripted_settings)) as service:
        yield service
        scripted(service).release()


def test_a_backend_error_fails_the_unit_and_the_next_one_is_made(held: Service, bus: Bus):
    weights = held.loaded.weights.base.ref
    publish(bus, work_unit(0, weights, work_row(1, prompt="boom")), work_unit(1, weights, work_row(2)))
    failed, made = batches(bus, 2)
    assert failed.error["error"]["code"] == "generation_failed" and "boom" in failed.error["detail"]
    assert images(made)[0, 0, 0, 0] == 2


def test_stopping_publishes_the_running_unit_and_leaves_the_others_to_other_replicas(
    held: Service, bus: Bus, tmp_path: Path, scripted_settings: dict, queue_url: str
):
    backend, weights = scripted(held), held.loaded.weights.base.ref
    backend.hold()
    publish(bus, *(work_unit(n, weights, work_row(n)) for n in range(5)))
    backend.inside.wait()
    stopping = threading.Thread(target=held.stop)
    stopping.start()
    backend.release()
    stopping.join()
    assert len(backend.batches) < 5
    with started(make_service(tmp_path / "other", queue_url, **scripted_settings)) as other:
        found = batches(bus, 5)
        made_there = scripted(other).batches
    assert [images(batch)[0, 0, 0, 0] for batch in found] == [0, 1, 2, 3, 4]
    assert sorted(backend.batches + made_there) == [[0], [1], [2], [3], [4]]


def test_requests_are_served_between_queued_units(held: Service, bus: Bus):
    backend, weights = scripted(held), held.loaded.weights.base.ref
    backend.hold()
    publish(bus, *(work_unit(n, weights, work_row(n)) for n in range(6)))
    backend.inside.wait()
    with served(held) as url, httpx.Client(base_url=url) as client:
        asked = threading.Thread(
            target=client.post, args=("/v1/images/generations",), kwargs={"json": {"prompt": "alpha", "seed": 77}}
        )
        asked.start()
        while held.engine.waiting_rows()["request"] == 0:
            pass
        backend.release()
        asked.join()
    batches(bus, 6)
    assert backend.batches.index([77]) == 1


def test_a_run_that_nobody_reads_keeps_no_worker_from_the_others(
    tmp_path: Path, scripted_settings: dict, queue_url: str, bus: Bus
):
    config = make_service(tmp_path, queue_url, **scripted_settings, queue_threads=2).config
    queue = QueueConfig(url=queue_url, lease_idle_s=1.0, max_deliveries=2, batch_gate=2)
    with started(Service(config, AgentConfig(), queue)) as service:
        weights = service.loaded.weights.base.ref
        publish(bus, *(work_unit(n, weights, work_row(n), run="stopped") for n in range(6)))
        while bus.batches_waiting("stopped") < 2:
            pass
        for number in range(3):
            units = [work_unit(n, weights, work_row(n), run=RUN, id=f"{RUN}.{number}.{n}.x") for n in range(2)]
            publish(bus, *units, number=number)
            assert [images(batch)[0, 0, 0, 0] for batch in batches(bus, 2)] == [0, 1]
        assert bus.batches_waiting("stopped") <= 2 + 1  # the gate, and what the other thread had in hand
        late = batches(bus, 6, "stopped")  # the run is read again: nothing of it was lost or given up
    assert [images(batch)[0, 0, 0, 0] for batch in late] == [0, 1, 2, 3, 4, 5]
    assert bus.depths() == {"waiting": 0, "in_work": 0, "dead": 0}


def test_workers_rest_when_all_that_waits_is_gated(
    tmp_path: Path, scripted_settings: dict, queue_url: str, bus: Bus, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("generator_service.queue_worker.GATED_REST_S", 600.0)
    config = make_service(tmp_path, queue_url, **scripted_settings, queue_threads=1).config
    queue = QueueConfig(url=queue_url, batch_gate=1)
    put_back: list[str] = []
    real = Bus.put_back_if_gated

    def counted(self: Bus, delivery: Delivery[WorkUnit]) -> bool:
        if gated := real(self, delivery):
            put_back.append(delivery.message.id)
        return gated

    monkeypatch.setattr(Bus, "put_back_if_gated", counted)
    with started(Service(config, AgentConfig(), queue)) as service:
        weights = service.loaded.weights.base.ref
        publish(bus, *(work_unit(n, weights, work_row(n), run="stopped") for n in range(4)))
        while len(put_back) < 4:
            pass
        threading.Event().wait(0.2)  # a worker that does not rest would put back hundreds more
    one_round = [f"stopped.0.{n}.x" for n in (1, 2, 3)]
    assert put_back == [*one_round, one_round[0]]  # stopping ended the rest at once


def test_a_broker_that_is_away_pauses_the_queue_only(tmp_path: Path, scripted_settings: dict, caplog):
    nowhere = "redis://127.0.0.1:1/0"
    with (
        started(make_service(tmp_path, nowhere, **scripted_settings)) as service,
        served(service) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        assert client.post("/v1/images/generations", json={"prompt": "alpha"}).status_code == 200
        body = {
            "run": RUN,
            "feedback": 0,
            "model_version": 0,
            "classes": [{"label": 0, "class_name": "alpha", "images": 1}],
        }
        answer = client.post("/v1/feedback", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "broker_unavailable")
        assert "retry-after" in answer.headers
        assert client.get("/metrics").status_code == 200
        assert client.get("/readyz").status_code == 200
    assert caplog.text.count("queued work pauses") == 1


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.event for record in caplog.records if hasattr(record, "event")]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("generator_service.queue_worker.RETRY_S", 0.05)
    monkeypatch.setattr("generator_service.queue_worker.QUIET_S", 0.3)


def wait_until(condition) -> None:
    deadline = time.monotonic() + 30.0
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.01)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_unit_is_kept_until_the_disk_has_room(held: Service, bus: Bus, caplog, impatient: None):
    records = held.config.samples_dir / "samples.jsonl"
    records.symlink_to("/dev/full")
    weights = held.loaded.weights.base.ref
    publish(bus, *(work_unit(n, weights, work_row(n)) for n in range(2)))
    wait_until(lambda: told(caplog) == ["disk_full"])
    time.sleep(0.5)  # several tries, while a third thread finds the broker well
    assert told(caplog) == ["disk_full"]
    assert (bus.batches_waiting(RUN), bus.depths()["dead"]) == (0, 0)
    records.unlink()
    found = batches(bus, 2)
    assert [images(batch)[0, 0, 0, 0] for batch in found] == [0, 1]
    assert held.samples.get(found[1].samples[0].id) == found[1].samples[0]
    wait_until(lambda: told(caplog) == ["disk_full", "recovered"])


def test_a_unit_is_kept_until_the_broker_has_memory(
    held: Service, bus: Bus, queue_url: str, caplog, impatient: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("generator_service.queue_worker.QUIET_S", 1.2)  # longer than the error's Retry-After
    backend, weights = scripted(held), held.loaded.weights.base.ref
    backend.hold()
    with connect(queue_url) as client:
        publish(bus, *(work_unit(n, weights, work_row(n)) for n in range(2)))
        backend.inside.wait()
        client.config_set("maxmemory", 1)
        backend.release()
        wait_until(lambda: told(caplog) == ["broker_full"])
        time.sleep(0.3)
        assert bus.batches_waiting(RUN) == 0
        client.config_set("maxmemory", 0)
    assert [images(batch)[0, 0, 0, 0] for batch in batches(bus, 2)] == [0, 1]
    wait_until(lambda: told(caplog) == ["broker_full", "recovered"])
    assert sorted(backend.batches) == [[0], [1]]  # none was made twice


def test_what_a_stopping_replica_has_in_hand_is_there_for_others_at_once(
    tmp_path: Path, scripted_settings: dict, queue_url: str, bus: Bus
):
    """Leases of ten minutes: nobody could wait for them."""
    queue = QueueConfig(url=queue_url, lease_idle_s=600.0)
    config = make_service(tmp_path, queue_url, **scripted_settings).config
    with started(Service(config, AgentConfig(), queue)) as stopping:
        backend, weights = scripted(stopping), stopping.loaded.weights.base.ref
        backend.hold()
        publish(bus, *(work_unit(n, weights, work_row(n)) for n in range(4)))
        backend.inside.wait()
        wait_until(lambda: bus.depths()["in_work"] == config.queue_threads)
        ending = threading.Thread(target=stopping.stop)
        ending.start()
        backend.release()
        ending.join()
    with connect(queue_url) as client:
        left = client.xpending_range(keys.WORK, keys.WORK_GROUP, "-", "+", 10)
    assert [entry["times_delivered"] for entry in left] == [0] * (config.queue_threads - 1)
    with started(Service(config, AgentConfig(), queue)):
        assert [images(batch)[0, 0, 0, 0] for batch in batches(bus, 4)] == [0, 1, 2, 3]


def test_an_answer_that_was_lost_is_made_again_alike(service: Service, http, bus: Bus, dataset: Dataset):
    """Also from pixels that came with the feedback, which its unit had on the broker."""
    pixels = codec.image_to_base64(dataset.image(dataset.samples[0].id))
    assert http.post("/v1/feedback", json=feedback(marginal(dataset, 0, pixels=pixels))).status_code == 202
    while (delivery := bus.next_batch(RUN, "test", 1.0)) is None:
        pass
    first = delivery.message
    made = codec.decode(bus.get_blob(first.blob))["images"]
    bus.lost.ask_again(delivery)
    (second,) = batches(bus, 1)
    assert second.attempt == 2
    assert [sample.id for sample in second.samples] == [sample.id for sample in first.samples]
    assert (images(second) == made).all()


@pytest.mark.parametrize("damage", ["blob_missing", "blob_corrupt"])
def test_init_images_that_are_gone_end_as_a_dead_letter_that_says_so(
    service: Service, bus: Bus, http, queue_url: str, damage: str
):
    weights = service.loaded.weights.base.ref
    init = bus.put_blob(codec.encode({"images": np.zeros((1, 8, 8, 3), np.uint8)}), blob_id="init")
    with connect(queue_url) as client:
        key = init.ref.removeprefix("redis:")
        client.delete(key) if damage == "blob_missing" else client.setrange(key, 100, b"?")
    publish(bus, work_unit(0, weights, work_row(1), strength=0.5, init_blob=init))
    (failed,) = batches(bus, 1)
    assert failed.error["error"]["code"] == damage
    (info,) = http.get("/v1/dead-letters").json()["data"]
    assert info["letter"]["problem"]["error"]["code"] == damage
    answer = http.post(f"/v1/dead-letters/{info['id']}/retry")
    assert answer.status_code == (410 if damage == "blob_missing" else 200)
