"""What operators ask over HTTP: runs, samples, sources, replicas, the queue."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from generator_service.service import Service
from protocol import codec
from protocol.bus import Bus, QueueConfig
from protocol.operations import QueueDepths, ReplicaList, RunList, RunStatus, ShownSampleList
from tests.generator_service.tiny_service import make_service, served, started
from tests.protocol.test_bus_board import a_run, a_sample


@pytest.fixture
def bus(queue_url: str) -> Iterator[Bus]:
    bus = Bus(queue_url, QueueConfig(url=queue_url))
    yield bus
    bus.close()


@pytest.fixture
def http(tmp_path: Path, scripted_settings: dict, queue_url: str) -> Iterator[httpx.Client]:
    """A service with a broker; its model need not be there."""
    with served(make_service(tmp_path, queue_url, **scripted_settings)) as url, httpx.Client(base_url=url) as client:
        yield client


def refused(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def test_runs_are_listed_and_found_by_name(http: httpx.Client, bus: Bus):
    assert http.get("/v1/runs").json() == {"object": "list", "data": []}
    bus.board.report(a_run("night"))
    assert RunList.model_validate_json(http.get("/v1/runs").content).data == [a_run("night")]
    assert RunStatus.model_validate_json(http.get("/v1/runs/night").content) == a_run("night")
    assert refused(http.get("/v1/runs/day")) == (404, "unknown_run")
    assert refused(http.get("/v1/runs/a%20b")) == (422, "invalid_request")


def test_samples_of_a_run_by_source(http: httpx.Client, bus: Bus):
    bus.board.show("night", [a_sample(number, f"s{number % 3}") for number in range(6)])

    def seeds(**parameters) -> list[int]:
        answer = http.get("/v1/runs/night/samples", params=parameters)
        return [one.sample.seed for one in ShownSampleList.model_validate_json(answer.content).data]

    assert seeds() == [5, 4, 3, 2, 1, 0]
    assert seeds(limit=2) == [5, 4]
    assert seeds(source=["s0", "s2"]) == [5, 3, 2, 0]
    assert seeds(source="s0", limit=1) == [3]
    for wrong in ({"limit": 0}, {"limit": 101}, {"source": ""}, {"source": ["s"] * 33}):
        assert refused(http.get("/v1/runs/night/samples", params=wrong)) == (422, "invalid_request")


def test_the_queue_and_the_replicas(http: httpx.Client):
    assert QueueDepths.model_validate_json(http.get("/v1/queue").content) == QueueDepths(waiting=0, in_work=0, dead=0)
    (replica,) = ReplicaList.model_validate_json(http.get("/v1/replicas").content).data
    assert (replica.state, replica.weights, replica.problem) == ("loading", None, None)


def test_without_a_broker_only_this_replica_is_known(scripted_service: Service):
    with served(scripted_service) as url, httpx.Client(base_url=url) as client:
        for path in ("/v1/runs", "/v1/runs/night", "/v1/runs/night/samples", "/v1/queue"):
            assert refused(client.get(path)) == (503, "broker_unavailable")
        (replica,) = client.get("/v1/replicas").json()["data"]
        assert (replica["state"], replica["weights"]["name"]) == ("ready", "base")
        assert refused(client.get("/v1/sources/any/image")) == (404, "unknown_sample")


def test_a_source_is_the_mounted_sample(tmp_path: Path, scripted_settings: dict, dataset_root: Path):
    with (
        started(make_service(tmp_path, **scripted_settings, dataset={"root": dataset_root})) as service,
        served(service) as url,
        httpx.Client(base_url=url) as client,
    ):
        dataset = service.loaded.dataset
        answer = client.get(f"/v1/sources/{dataset.samples[3].id}/image")
        assert answer.headers["Content-Type"] == "image/png"
        assert "private" in answer.headers["Cache-Control"]
        np.testing.assert_array_equal(codec.image_from_bytes(answer.content), dataset.image(3))
        assert refused(client.get("/v1/sources/nope/image")) == (404, "unknown_sample")
