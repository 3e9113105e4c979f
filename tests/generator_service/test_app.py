"""The HTTP contract: errors, authorisation, limits, idempotency, jobs, events, cancelling. Real server, real HTTP."""

from __future__ import annotations

import base64
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from generator_service.batching import Generation
from generator_service.service import Service
from protocol import codec
from protocol.messages import ImageGenerationRequest, ImagesResponse, Job, JobEvent
from tests.generator_service.conftest import scripted
from tests.generator_service.tiny_service import make_service, served, started

IMAGES = "/v1/images/generations"


@pytest.fixture
def http(scripted_service: Service) -> Iterator[httpx.Client]:
    with served(scripted_service) as url, httpx.Client(base_url=url) as client:
        yield client
        scripted(scripted_service).release()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, scripted_settings: dict) -> Iterator[httpx.Client]:
    """One service for the tests that change nothing."""
    with (
        started(make_service(tmp_path_factory.mktemp("shared"), **scripted_settings)) as service,
        served(service) as url,
        httpx.Client(base_url=url) as client,
    ):
        yield client


def problem(response: httpx.Response, status: int, code: str, param: str | None = None) -> str:
    """The message of a problem document, checked against RFC 9457 and OpenAI's shape."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    document = response.json()
    assert (document["status"], document["type"]) == (status, f"urn:onthefly:error:{code}")
    inner = document["error"]
    assert inner["code"] == code and inner["message"] == document["detail"]
    if param is not None:
        assert inner["param"] == param
    return inner["message"]


def images(response: httpx.Response) -> list[np.ndarray]:
    assert response.status_code == 200, response.text
    body = ImagesResponse.model_validate_json(response.content)
    return [codec.image_from_base64(image.b64_json) for image in body.data]


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"colour": "red"}, "invalid_request", "colour"),
        ({"n": 0}, "invalid_request", "n"),
        ({"n": 65}, "invalid_request", "n"),
        ({"n": "many"}, "invalid_request", "n"),
        ({"seed": -1}, "invalid_request", "seed"),
        ({"seed": 2**63}, "invalid_request", "seed"),
        ({"strength": 1.5, "image": "x"}, "invalid_request", "strength"),
        ({"guidance_scale": 1e9}, "invalid_request", "guidance_scale"),
        ({"num_inference_steps": 0}, "invalid_request", "num_inference_steps"),
        ({"scheduler": "euler"}, "unsupported_field", "scheduler"),
        ({"scheduler": "fast"}, "invalid_request", "scheduler"),
        ({"prompt": ""}, "invalid_request", "prompt"),
        ({"prompt": "zebra"}, "unknown_class", "prompt"),
        ({"class_label": 3}, "unknown_class", "class_label"),
        ({"class_label": "zebra"}, "unknown_class", "class_label"),
        ({"style": "vivid"}, "unsupported_field", "style"),
        ({"stream": True}, "unsupported_field", "stream"),
        ({"size": "512x512"}, "unsupported_field", "size"),
        ({"image": "AAAA"}, "invalid_image", None),
        ({"image": "http://example.com/x.png"}, "invalid_image", None),
        ({"model": "nope"}, "unknown_weights", "model"),
        ({"model": "base@7"}, "unknown_weights", "model"),
    ],
    ids=str,
)
def test_a_wrong_field_is_named(shared: httpx.Client, fields: dict, code: str, param: str | None):
    problem(shared.post(IMAGES, json={"prompt": "alpha"} | fields), 404 if "weights" in code else 422, code, param)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"prompt": NaN}', b"[" * 5000, b'{"prompt": "\\ud800"}']
)
def test_a_malformed_body_is_invalid_not_a_crash(shared: httpx.Client, content: bytes):
    for path in (IMAGES, "/v1/jobs", "/v1/feedback"):
        problem(
            shared.post(path, content=content, headers={"Content-Type": "application/json"}), 422, "invalid_request"
        )


def test_infinite_and_nan_numbers_are_refused(shared: httpx.Client):
    for value in ("NaN", "Infinity", "1e999"):
        content = f'{{"prompt": "alpha", "guidance_scale": {value}}}'
        problem(
            shared.post(IMAGES, content=content, headers={"Content-Type": "application/json"}), 422, "invalid_request"
        )


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nope", 404, "not_found"),
        ("GET", "/v1/jobs/nope", 404, "unknown_job"),
        ("DELETE", "/v1/jobs/nope", 404, "unknown_job"),
        ("GET", "/v1/jobs/nope/events", 404, "unknown_job"),
        ("GET", "/v1/samples/nope", 404, "unknown_sample"),
        ("GET", "/v1/samples/nope/image", 404, "unknown_sample"),
        ("POST", "/v1/weights/nope/activate", 404, "unknown_weights"),
        ("GET", "/v1/samples/..%2F..%2Fsamples.jsonl/image", 404, "not_found"),
    ],
)
def test_what_is_not_there_is_a_problem_document(shared: httpx.Client, method: str, path: str, status: int, code: str):
    problem(shared.request(method, path), status, code)


def test_a_wrong_method_is_405_and_tells_the_right_ones(shared: httpx.Client):
    response = shared.put("/v1/weights")
    problem(response, 405, "invalid_request")
    assert "GET" in response.headers["allow"]


@pytest.mark.parametrize(
    "body",
    [
        {"type": "paint"},
        {"type": "adapt"},
        {"type": "adapt", "name": "../up"},
        {"type": "adapt", "name": "x", "steps": 0},
        {"type": "adapt", "name": "x", "learning_rate": -1},
        {"type": "generate", "request": {"prompt": "zebra"}},
    ],
    ids=str,
)
def test_a_wrong_job_is_refused_and_leaves_no_job(shared: httpx.Client, body: dict):
    assert shared.post("/v1/jobs", json=body).status_code == 422
    assert shared.get("/v1/jobs").json()["data"] == []


def test_an_adaptation_without_a_dataset_says_what_to_set(shared: httpx.Client):
    assert "generator.dataset" in problem(
        shared.post("/v1/jobs", json={"type": "adapt", "name": "x"}), 422, "invalid_request"
    )


def test_the_base_cannot_be_overwritten(shared: httpx.Client):
    problem(shared.post("/v1/jobs", json={"type": "adapt", "name": "base"}), 422, "invalid_request", "name")


def test_a_backend_that_raises_is_generation_failed_and_the_service_goes_on(http: httpx.Client):
    failed = http.post(IMAGES, json={"prompt": "boom", "class_label": "alpha"})
    assert "RuntimeError" in problem(failed, 500, "generation_failed")
    assert len(images(http.post(IMAGES, json={"prompt": "alpha"}))) == 1


# ---------------------------------------------------------------- limits and keys


@pytest.fixture
def small(tmp_path: Path, scripted_settings: dict) -> Iterator[httpx.Client]:
    """A service with a key and a small body limit."""
    service = make_service(tmp_path, **scripted_settings, max_body_bytes=2000, api_key="s3cret")
    with (
        started(service),
        served(service) as url,
        httpx.Client(base_url=url, headers={"Authorization": "Bearer s3cret"}) as client,
    ):
        yield client


@pytest.mark.parametrize("size", [2001, 10_000, 1_000_000])
def test_an_oversize_body_is_refused_by_its_length(small: httpx.Client, size: int):
    assert "2000 bytes" in problem(small.post(IMAGES, content=b" " * size), 413, "body_too_large")


@pytest.mark.parametrize("chunks", [3, 30])
def test_an_oversize_body_is_refused_while_it_streams(small: httpx.Client, chunks: int):
    response = small.post(IMAGES, content=(b" " * 1000 for _ in range(chunks)))
    problem(response, 413, "body_too_large")


def test_a_body_within_the_limit_passes_whole_also_in_chunks(small: httpx.Client):
    content = json.dumps({"prompt": "alpha", "user": "u" * 200}).encode()
    response = small.post(
        IMAGES,
        content=(content[i : i + 10] for i in range(0, len(content), 10)),
        headers={"Content-Type": "application/json"},
    )
    assert len(images(response)) == 1


@pytest.mark.parametrize("header", ["", "Bearer wrong", "Basic s3cret", "s3cret", "Bearer s3cret2"])
def test_a_wrong_key_is_refused_everywhere_but_for_probes(small: httpx.Client, header: str):
    for method, path in (("POST", IMAGES), ("GET", "/v1/jobs"), ("GET", "/metrics"), ("GET", "/nope")):
        response = small.request(method, path, headers={"Authorization": header})
        problem(response, 401, "unauthorized")
        assert response.headers["www-authenticate"] == "Bearer"
    for path in ("/livez", "/readyz"):
        assert small.get(path, headers={"Authorization": header}).status_code == 200


def test_the_key_may_come_from_the_environment(tmp_path: Path, scripted_settings: dict, monkeypatch):
    monkeypatch.setenv("ONTHEFLY_API_KEY", "fromenv")
    with started(make_service(tmp_path, **scripted_settings)) as service, served(service) as url:
        assert httpx.get(f"{url}/v1/jobs").status_code == 401
        assert httpx.get(f"{url}/v1/jobs", headers={"Authorization": "Bearer fromenv"}).status_code == 200


def test_a_full_queue_is_429_with_retry_after(http: httpx.Client, scripted_service: Service):
    backend = scripted(scripted_service)
    backend.hold()
    engine = scripted_service.engine
    order = scripted_service.order
    made = order(ImageGenerationRequest(prompt="alpha", n=64))
    for _ in range(4):
        engine.submit(Generation(made.weights, made.sampling, made.rows))
    backend.inside.wait()
    engine.submit(Generation(made.weights, made.sampling, made.rows[:32]))  # 32 run, 256 wait
    for path, body in (
        (IMAGES, {"prompt": "alpha"}),
        ("/v1/jobs", {"type": "generate", "request": {"prompt": "alpha"}}),
    ):
        response = http.post(path, json=body)
        problem(response, 429, "queue_full")
        assert int(response.headers["retry-after"]) >= 1
    assert http.get("/v1/jobs").json()["data"] == []


# ---------------------------------------------------------------- idempotency


def test_the_same_key_and_body_have_one_effect(http: httpx.Client):
    headers = {"Idempotency-Key": "k1"}
    for path, body in (
        (IMAGES, {"prompt": "alpha"}),
        ("/v1/jobs", {"type": "generate", "request": {"prompt": "alpha"}}),
    ):
        headers = {"Idempotency-Key": path}
        first, second = http.post(path, json=body, headers=headers), http.post(path, json=body, headers=headers)
        assert first.content == second.content and first.status_code == second.status_code
        assert first.headers.get("location") == second.headers.get("location")
        conflict = http.post(path, json=body | {"type": "x"}, headers=headers)
        problem(conflict, 409, "idempotency_conflict", "Idempotency-Key")
    assert len(http.get("/v1/jobs").json()["data"]) == 1


def test_a_key_in_flight_joins_the_first_request_and_survives_its_client(http, scripted_service: Service):
    backend = scripted(scripted_service)
    backend.hold()
    headers, body = {"Idempotency-Key": "k"}, {"prompt": "alpha", "seed": 5}
    gone = threading.Thread(target=_post_and_leave, args=(str(http.base_url), body, headers, backend))
    gone.start()
    gone.join()
    replies = []
    again = threading.Thread(target=lambda: replies.append(http.post(IMAGES, json=body, headers=headers)))
    again.start()
    problem(http.post(IMAGES, json=body | {"seed": 6}, headers=headers), 409, "idempotency_conflict")
    backend.release()
    again.join()
    assert images(replies[0])[0][0, 0, 0] == 5
    assert backend.batches == [[5]]


def _post_and_leave(url: str, body: dict, headers: dict, backend) -> None:
    """Send a request and close the connection while it is being served."""
    with httpx.Client(base_url=url) as client:
        request = client.build_request("POST", IMAGES, json=body, headers=headers)
        raw = f"POST {IMAGES} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in request.headers.items()) + "\r\n"
        with socket.create_connection((request.url.host, request.url.port)) as connection:
            connection.sendall(raw.encode() + request.content)
            backend.inside.wait()


# ---------------------------------------------------------------- cancelling and jobs


def test_a_client_that_goes_away_cancels_its_rows(http: httpx.Client, scripted_service: Service):
    backend = scripted(scripted_service)
    backend.hold()
    cancelled = threading.Event()
    engine, cancel = scripted_service.engine, scripted_service.engine.cancel
    engine.cancel = lambda generation: (cancel(generation), cancelled.set())
    _post_and_leave(str(http.base_url), {"prompt": "alpha", "seed": 5}, {}, backend)
    cancelled.wait()
    backend.release()
    assert images(http.post(IMAGES, json={"prompt": "alpha", "seed": 6}))[0][0, 0, 0] == 6
    begun = backend.events.index(("batch", "base@1", [5]))
    after = [event[0] for event in backend.events[begun + 1 :] if event[0] in ("batch", "step")]
    assert after.index("batch") == 1  # aborted after its first step of four


def events(http: httpx.Client, job: str, after: int | None = None) -> list[JobEvent]:
    headers = {} if after is None else {"Last-Event-ID": str(after)}
    response = http.get(f"/v1/jobs/{job}/events", headers=headers)
    assert response.headers["content-type"].startswith("text/event-stream")
    found = []
    for block in response.text.strip().split("\n\n"):
        if not block:
            continue
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        event = JobEvent.model_validate_json(fields["data"])
        assert (fields["id"], fields["event"]) == (str(event.seq), event.kind)
        found.append(event)
    return found


def test_a_job_from_submission_to_its_result(http: httpx.Client):
    submitted = http.post("/v1/jobs", json={"type": "generate", "request": {"prompt": "alpha", "n": 2, "seed": 3}})
    assert submitted.status_code == 202
    job = Job.model_validate_json(submitted.content)
    assert submitted.headers["location"] == f"/v1/jobs/{job.id}"
    found = events(http, job.id)
    assert [event.kind for event in found] == ["status", "status", *["progress"] * 4, "end"]
    assert [event.data["step"] for event in found if event.kind == "progress"] == [1, 2, 3, 4]
    assert [event.seq for event in found] == [1, 2, 3, 4, 5, 6, 7]
    assert [event.seq for event in events(http, job.id, after=4)] == [5, 6, 7]
    assert events(http, job.id, after=7) == []
    final = Job.model_validate_json(http.get(submitted.headers["location"]).content)
    assert final.status == "succeeded" and final == Job.model_validate(found[-1].data)
    result = ImagesResponse.model_validate(final.result)
    assert [image.seed for image in result.data] == [3, 4]
    assert [entry["id"] for entry in http.get("/v1/jobs").json()["data"]] == [job.id]


@pytest.mark.parametrize("value", ["x", "-1", "1.5", "9" * 30])
def test_a_wrong_last_event_id_is_refused(http: httpx.Client, value: str):
    job = http.post("/v1/jobs", json={"type": "generate", "request": {"prompt": "alpha"}}).json()["id"]
    response = http.get(f"/v1/jobs/{job}/events", headers={"Last-Event-ID": value})
    problem(response, 422, "invalid_request", "Last-Event-ID")


def test_a_running_job_is_cancelled_between_steps(http: httpx.Client, scripted_service: Service):
    backend = scripted(scripted_service)
    backend.hold()
    job = http.post("/v1/jobs", json={"type": "generate", "request": {"prompt": "alpha"}}).json()["id"]
    backend.inside.wait()
    assert http.delete(f"/v1/jobs/{job}").status_code == 202
    backend.release()
    final = events(http, job)[-1].data
    assert (final["status"], final["problem"]["error"]["code"]) == ("cancelled", "cancelled")
    assert http.delete(f"/v1/jobs/{job}").json()["status"] == "cancelled"


def test_a_failed_job_carries_its_problem(http: httpx.Client):
    body = {"type": "generate", "request": {"prompt": "boom", "class_label": 0}}
    job = http.post("/v1/jobs", json=body).json()["id"]
    final = events(http, job)[-1].data
    assert (final["status"], final["problem"]["error"]["code"]) == ("failed", "generation_failed")


def test_silent_streams_are_kept_alive(tmp_path: Path, scripted_settings: dict):
    service = make_service(tmp_path, **scripted_settings, keep_alive_s=0.01)
    with started(service), served(service) as url, httpx.Client(base_url=url) as client:
        backend = scripted(service)
        backend.hold()
        job = client.post("/v1/jobs", json={"type": "generate", "request": {"prompt": "alpha"}}).json()["id"]
        with client.stream("GET", f"/v1/jobs/{job}/events") as response:
            lines = response.iter_lines()
            while next(lines) != ": keep-alive":
                pass
            backend.release()
            assert any(line == "event: end" for line in lines)


# ---------------------------------------------------------------- health, metrics, samples


def test_liveness_comes_before_readiness(tmp_path: Path, scripted_settings: dict):
    service = make_service(tmp_path, **scripted_settings)
    with served(service) as url, httpx.Client(base_url=url) as client:
        assert client.get("/livez").status_code == 200
        for method, path, body in (
            ("GET", "/readyz", None),
            ("POST", IMAGES, {"prompt": "alpha"}),
            ("POST", "/v1/jobs", {"type": "adapt", "name": "x"}),
            ("GET", "/v1/weights", None),
            ("POST", "/v1/feedback", {"run": "r", "feedback": 0, "model_version": 0, "classes": [SHORTAGE]}),
        ):
            response = client.request(method, path, json=body)
            problem(response, 503, "not_ready")
            assert int(response.headers["retry-after"]) >= 1
        assert client.get("/metrics").status_code == 200
        with started(service):
            assert client.get("/readyz").status_code == 200
            assert scripted(service).events[-1] == ("step", 1)  # a real forward pass


SHORTAGE = {"label": 0, "class_name": "alpha", "images": 1}


def test_feedback_without_a_broker_is_503_and_images_still_work(http: httpx.Client):
    body = {"run": "r", "feedback": 0, "model_version": 0, "classes": [SHORTAGE]}
    response = http.post("/v1/feedback", json=body)
    assert "broker.url" in problem(response, 503, "broker_unavailable")
    assert "retry-after" in response.headers
    assert len(images(http.post(IMAGES, json={"prompt": "alpha"}))) == 1


def test_metrics_count_what_happened(http: httpx.Client):
    http.post(IMAGES, json={"prompt": "alpha", "n": 3})
    http.post(IMAGES, json={"prompt": "zebra"})
    page = http.get("/metrics").text
    assert f'onthefly_requests_total{{method="POST",route="{IMAGES}",status="200"}} 1.0' in page
    assert f'onthefly_requests_total{{method="POST",route="{IMAGES}",status="422"}} 1.0' in page
    assert "onthefly_images_total 3.0" in page
    assert "onthefly_batch_rows_sum 3.0" in page
    assert 'onthefly_active_weights_info{digest="' in page and 'name="base",version="1"}' in page
    assert 'onthefly_waiting_rows{lane="queue"} 0.0' in page


def test_the_documentation_is_served(http: httpx.Client):
    assert http.get("/docs").status_code == 200
    assert IMAGES in http.get("/openapi.json").json()["paths"]


@pytest.mark.parametrize(("path", "methods"), [("/v1/jobs", "GET, POST"), ("/v1/jobs/x", "DELETE, GET")])
def test_a_wrong_method_is_told_all_right_ones(shared: httpx.Client, path: str, methods: str):
    assert shared.put(path).headers["allow"] == methods


@pytest.mark.parametrize(("image_format", "magic"), [("png", b"\x89PNG"), ("jpeg", b"\xff\xd8"), ("webp", b"RIFF")])
def test_images_come_in_the_format_asked_for_by_value_or_by_url(http: httpx.Client, image_format: str, magic: bytes):
    body = {"prompt": "alpha", "output_format": image_format, "user": "me"}
    inline = http.post(IMAGES, json=body).json()
    assert base64.b64decode(inline["data"][0]["b64_json"]).startswith(magic)
    linked = http.post(IMAGES, json=body | {"response_format": "url"}).json()
    assert (linked["output_format"], linked["size"], linked["data"][0]["b64_json"]) == (image_format, "8x8", None)
    response = http.get(linked["data"][0]["url"])
    assert response.content.startswith(magic) and response.headers["content-type"] == f"image/{image_format}"
    provenance = http.get(f"/v1/samples/{linked['data'][0]['sample_id']}").json()
    assert (provenance["seed"], provenance["user"], provenance["class_name"]) == (
        linked["data"][0]["seed"],
        "me",
        "alpha",
    )
    assert provenance["weights"] == linked["weights"]


def test_errors_quote_little_of_a_large_input(shared: httpx.Client):
    for body in ({"prompt": "alpha", "x" * 100_000: 1}, {"type": "y" * 100_000}):
        path = "/v1/jobs" if "type" in body else "/v1/images/generations"
        answer = shared.post(path, json=body)
        assert answer.status_code == 422
        assert len(answer.content) < 5_000


def test_invented_methods_are_counted_together(shared: httpx.Client):
    for number in range(3):
        shared.request(f"FOO{number}", "/v1/jobs")
    page = shared.get("/metrics").text
    assert "FOO" not in page
    assert 'method="other"' in page
