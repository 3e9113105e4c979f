"""Ids, log lines and counts of HTTP requests, over a real server."""

from __future__ import annotations

import io
import json
import logging
import re
import time
from collections.abc import Callable, Iterator

import httpx
import pytest

from generator_service.service import Service
from protocol import logs
from tests.generator_service.tiny_service import make_service, served, started

IMAGES = "/v1/images/generations"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, scripted_settings: dict) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("observed")
    with started(make_service(folder, api_key="hush", **scripted_settings)) as service:
        yield service


@pytest.fixture(scope="module")
def http(service: Service) -> Iterator[httpx.Client]:
    with (
        served(service) as url,
        httpx.Client(base_url=url, headers={"Authorization": "Bearer hush"}) as client,
    ):
        yield client


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[dict]]]:
    """What is logged meanwhile, once there are so many lines: a request's is written when its caller has the reply."""
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(logs.JsonLines("generator"))
    monkeypatch.setattr(logging.root, "handlers", [handler])
    level = logging.root.level
    logging.root.setLevel(logging.INFO)

    def read(at_least: int = 0) -> list[dict]:
        while True:  # the per-test timeout ends a wait for what never comes
            every = [json.loads(line) for line in written.getvalue().splitlines(keepends=True) if line.endswith("\n")]
            ours = [line for line in every if not line["logger"].startswith(("uvicorn", "httpx"))]
            if len(ours) >= at_least:
                return ours
            time.sleep(0.01)

    yield read
    logging.root.setLevel(level)


def access(lines: list[dict]) -> list[dict]:
    return [line for line in lines if line["logger"] == "access"]


def test_a_sane_id_is_taken_and_is_in_the_reply_the_problem_and_the_log(http: httpx.Client, lines: Callable):
    response = http.post(IMAGES, json={"prompt": "zebra"}, headers={"X-Request-ID": "my.run-1_2"})
    assert response.status_code == 422
    assert response.headers["x-request-id"] == response.json()["request_id"] == "my.run-1_2"
    (line,) = access(lines(1))
    assert (line["request_id"], line["method"], line["route"], line["status"]) == ("my.run-1_2", "POST", IMAGES, 422)
    assert line["caller"] == "user"
    assert line["ms"] > 0 and "zebra" not in json.dumps(line)


@pytest.mark.parametrize("given", [None, "", "x" * 129, "a b", 'a"b', "a\tb", "é".encode()])
def test_another_id_is_replaced_by_one_of_the_services_own(http: httpx.Client, given: str | bytes | None):
    responses = [http.get("/v1/jobs", headers={} if given is None else {"X-Request-ID": given}) for _ in range(2)]
    ids = {response.headers["x-request-id"] for response in responses}
    assert len(ids) == 2 and all(re.fullmatch("[0-9a-f]{16}", name) for name in ids)


@pytest.mark.parametrize("path", ["/v1/jobs", "/nope"])
def test_who_is_refused_at_the_door_has_an_id_too(http: httpx.Client, lines: Callable, path: str):
    response = http.get(path, headers={"Authorization": "Bearer wrong"})
    assert response.status_code == 401
    assert response.json()["request_id"] == response.headers["x-request-id"] == access(lines(1))[0]["request_id"]
    assert "wrong" not in json.dumps(lines())


def test_what_nobody_foresaw_is_a_problem_and_is_counted_and_logged(
    http: httpx.Client, service: Service, lines: Callable, monkeypatch: pytest.MonkeyPatch
):
    def break_down(owner: str | None) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(service.jobs, "list", break_down)
    response = http.get("/v1/jobs")
    assert response.status_code == 500 and response.headers["content-type"] == "application/problem+json"
    document = response.json()
    assert document["error"]["code"] == "generation_failed" and "secret" not in response.text
    bug, line = lines(2)
    assert "RuntimeError: secret detail" in bug["traceback"] and bug["level"] == "error"
    assert {bug["request_id"], line["request_id"], response.headers["x-request-id"]} == {document["request_id"]}
    assert line["status"] == 500
    page = http.get("/metrics").text
    assert 'onthefly_requests_total{method="GET",route="/v1/jobs",status="500"} 1.0' in page


def test_probes_leave_no_lines(http: httpx.Client, lines: Callable):
    for path in ("/livez", "/readyz", "/metrics"):
        assert http.get(path).status_code == 200
    assert lines() == []


def test_every_request_is_timed(http: httpx.Client):
    http.get("/v1/weights")
    page = http.get("/metrics").text
    count = re.search(r'onthefly_request_seconds_count\{method="GET",route="/v1/weights"\} (\S+)', page)
    assert float(count[1]) >= 1


def test_a_job_goes_on_under_its_requests_id(http: httpx.Client, lines: Callable):
    asked = {"type": "generate", "request": {"prompt": "boom", "class_label": "alpha"}}
    response = http.post("/v1/jobs", json=asked, headers={"X-Request-ID": "job-7"})
    assert response.status_code == 202, response.text
    job = response.json()["id"]
    with http.stream("GET", f"/v1/jobs/{job}/events") as events:
        assert "failed" in events.read().decode()
    (bug,) = [line for line in lines() if line["message"] == "a job failed"]
    assert bug["request_id"] == "job-7" and "boom" in bug["traceback"]
