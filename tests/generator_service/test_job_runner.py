"""Adaptations as jobs: equal ones, and what is left of those that nobody went on with."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from generator_service import job_runner, registry
from generator_service.backends.interface import Progress
from generator_service.job_runner import JobRunner
from generator_service.jobs import JobTable
from generator_service.service import Service
from generator_service.weights import WeightStore
from tests.generator_service.tiny_service import served

ADAPT = {"type": "adapt", "name": "same", "steps": 1, "batch_size": 4}


class Held:
    """An adaptation that lasts until it is let go; counts how many began."""

    def __init__(self) -> None:
        self.began, self.inside, self.go = 0, threading.Event(), threading.Event()

    def __call__(self, backend, base, real, classes, job, folder: Path, unfinished: Path) -> Iterator[Progress]:
        self.began += 1
        self.inside.set()
        while not self.go.wait(0.01):
            yield Progress(0, 1, None)
        (folder / "made").write_bytes(bytes([self.began]))
        yield Progress(1, 1, 0.5)
        return "class_embedding", {}


held: Held


def adaptation(*args):
    return held(*args)


@pytest.fixture(autouse=True)
def _held(monkeypatch):
    global held
    held = Held()
    monkeypatch.setitem(registry.ADAPTATIONS, "cold_start", f"{__name__}:adaptation")
    yield
    held.go.set()


@pytest.fixture
def http(dit_service: Service) -> Iterator[httpx.Client]:
    with served(dit_service) as url, httpx.Client(base_url=url, timeout=60.0) as client:
        yield client


def begin(http: httpx.Client, **fields) -> str:
    return http.post("/v1/jobs", json=ADAPT | fields).json()["id"]


def ended(http: httpx.Client, job: str) -> dict:
    http.get(f"/v1/jobs/{job}/events")
    return http.get(f"/v1/jobs/{job}").json()


def test_equal_jobs_train_once(http: httpx.Client):
    jobs = [begin(http), begin(http)]
    held.inside.wait()
    held.go.set()
    first, second = (ended(http, job) for job in jobs)
    assert first["status"] == second["status"] == "succeeded" and held.began == 1
    assert first["result"] == second["result"] and first["result"]["version"] == 1


def test_equal_jobs_may_be_asked_to_train_again(http: httpx.Client):
    jobs = [begin(http, again=True), begin(http, again=True)]
    held.go.set()
    assert {ended(http, job)["result"]["version"] for job in jobs} == {1, 2} and held.began == 2


def test_a_job_that_waits_for_an_equal_one_can_be_cancelled(http: httpx.Client):
    first = begin(http)
    held.inside.wait()
    second = begin(http)
    http.delete(f"/v1/jobs/{second}")
    assert ended(http, second)["status"] == "cancelled"
    held.go.set()
    assert ended(http, first)["status"] == "succeeded" and held.began == 1


def test_other_models_than_the_base_make_another_recipe(http: httpx.Client, dit_service: Service, monkeypatch):
    held.go.set()
    assert ended(http, begin(http))["result"]["version"] == 1
    monkeypatch.setattr(dit_service.loaded.backend, "beside_base", lambda: "an image encoder")
    assert ended(http, begin(http))["result"]["version"] == 2 and held.began == 2


def test_what_nobody_went_on_with_is_removed_at_the_start(tmp_path: Path):
    base = tmp_path / "base"
    base.mkdir()
    store = WeightStore(tmp_path / "weights", base, "dit", ())
    old, young = (store.root / f"{job_runner.UNFINISHED}{name}" for name in ("old", "young"))
    for folder, age_s in ((old, job_runner.KEPT_S + 60), (young, job_runner.KEPT_S - 60)):
        folder.mkdir()
        (folder / "checkpoint").write_bytes(b"")
        os.utime(folder, (time.time() - age_s,) * 2)
    JobRunner(JobTable(), None, None, store, None, None, [], 1, None, {}, None, {}, None)
    assert not old.exists() and (young / "checkpoint").exists()
