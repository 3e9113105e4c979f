"""Limits, in small and over HTTP: rates, quotas, bodies, what large requests do to others, connections."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from PIL import Image

from generator_service.__main__ import Server
from generator_service.feedback_quota import FORGOTTEN_S, FeedbackQuota
from generator_service.limits import Bodies, RateLimit, check_values
from generator_service.routes import json_route
from generator_service.service import Service
from protocol.errors import BodyTooLarge, BrokerUnavailable, QueueFull, RateLimited
from protocol.messages import JobEvent
from tests.generator_service.conftest import scripted
from tests.generator_service.test_app import IMAGES, problem
from tests.generator_service.tiny_service import make_service, served, started

Http = Callable[..., httpx.Client]


@pytest.fixture
def serve(tmp_path: Path, scripted_settings: dict) -> Iterator[Callable]:
    """A started service of these settings and a maker of its clients, by key."""

    @contextmanager
    def serve(**settings: object) -> Iterator[tuple[Service, Http]]:
        with started(make_service(tmp_path, **scripted_settings, **settings)) as service, served(service) as url:

            def http(key: str = "") -> httpx.Client:
                return httpx.Client(base_url=url, timeout=60, headers={"Authorization": f"Bearer {key}"} if key else {})

            yield service, http
            scripted(service).release()

    yield serve


# ---------------------------------------------------------------- rates and quotas


def test_a_rate_is_a_bucket_that_fills_up():
    now = [0.0]
    rate = RateLimit(60.0, 3, clock=lambda: now[0])
    for _ in range(3):
        rate.take("a")
    with pytest.raises(RateLimited) as refused:
        rate.take("a")
    assert refused.value.retry_after == pytest.approx(1.0)
    rate.take("b")
    now[0] = 0.75
    with pytest.raises(RateLimited) as refused:
        rate.take("a")
    assert refused.value.retry_after == pytest.approx(0.25)
    now[0] = 1.0
    rate.take("a")
    now[0] = 1000.0  # no more than the burst is saved up
    for _ in range(3):
        rate.take("a")
    with pytest.raises(RateLimited):
        rate.take("a")


def test_the_rate_is_of_each_key_and_not_of_probes(serve: Callable):
    settings = {"keys": {"alice": "rabbit", "bob": "hatter"}, "limits": {"requests_per_minute": 1, "burst": 2}}
    with serve(**settings) as (_, http), http("rabbit") as alice, http("hatter") as bob:
        assert [alice.get("/v1/jobs").status_code for _ in range(3)] == [200, 200, 429]
        refused = alice.get("/v1/jobs")
        problem(refused, 429, "rate_limited")
        assert 50 <= int(refused.headers["retry-after"]) <= 60
        assert bob.get("/v1/jobs").status_code == 200
        assert alice.get("/livez").status_code == 200


def test_images_and_jobs_that_wait_are_counted_for_each_key(serve: Callable):
    settings = {
        "keys": {"alice": "rabbit", "bob": "hatter"},
        "max_batch": 1,
        "limits": {"waiting_images": 4, "unfinished_jobs": 2},
    }
    with serve(**settings) as (service, http), http("rabbit") as alice, http("hatter") as bob:
        backend = scripted(service)
        backend.hold()

        def job(client: httpx.Client, n: int) -> httpx.Response:
            return client.post("/v1/jobs", json={"type": "generate", "request": {"prompt": "alpha", "n": n}})

        assert job(alice, 1).status_code == 202
        backend.inside.wait()
        assert "4 may" in problem(job(alice, 5), 429, "queue_full")
        mine = job(alice, 4)
        assert mine.status_code == 202
        assert "2 of them yours" in problem(job(alice, 1), 429, "queue_full")
        assert job(bob, 4).status_code == 202
        assert alice.delete(mine.headers["location"]).status_code == 202


def test_a_job_is_its_owners_and_an_administrators(serve: Callable):
    keys = {"keys": {"alice": "rabbit", "bob": "hatter"}, "admin_key": "boss"}
    with serve(**keys) as (_, http), http("rabbit") as alice, http("hatter") as bob, http("boss") as admin:
        made = alice.post("/v1/jobs", json={"type": "generate", "request": {"prompt": "alpha"}})
        path = made.headers["location"]
        assert "succeeded" in alice.get(f"{path}/events").text
        for refused in (bob.get(path), bob.get(f"{path}/events"), bob.delete(path)):
            assert "somebody else's" in problem(refused, 403, "forbidden")
        assert bob.get("/v1/jobs").json()["data"] == []
        for client in (alice, admin):
            assert [job["id"] for job in client.get("/v1/jobs").json()["data"]] == [made.json()["id"]]
            assert client.get(path).json()["result"]["data"]


class Quota:
    """A quota of four units, whose answers and clock the test has in hand."""

    def __init__(self) -> None:
        self.done: set[str] = set()
        self.asked_for: list[int] = []  # how many units the broker was asked about
        self.now = 0.0
        self.quota = FeedbackQuota(4, self.unanswered, clock=lambda: self.now)

    def unanswered(self, units: Sequence[str]) -> list[str]:
        self.asked_for.append(len(units))
        return [unit for unit in units if unit not in self.done]

    def take(self, caller: str, run: str, feedback: int, units: list[str], error: Exception | None = None) -> None:
        with self.quota.taking(caller, run, feedback, units):
            if error is not None:
                raise error


def test_feedback_that_is_not_answered_is_counted_for_each_caller():
    quota = Quota()
    quota.take("a", "run", 0, ["0.0", "0.1", "0.2"])
    with pytest.raises(QueueFull, match="3 work units"):
        quota.take("a", "run", 1, ["1.0", "1.1"])
    quota.take("b", "other", 0, ["o"] * 9)  # more than may wait, with nothing else on the queue
    quota.take("a", "run", 0, ["0.0", "0.1", "0.2"])  # the same again
    quota.take("a", "run", 1, ["1.0"])
    quota.done |= {"0.0", "0.1"}
    quota.take("a", "run", 2, ["2.0", "2.1"])
    with pytest.raises(QueueFull):
        quota.take("a", "run", 3, ["3.0"])
    quota.take("a", "run", 0, ["0.0"])  # it begins anew
    quota.take("a", "run", 1, ["1.0", "1.1", "1.2"])


def test_feedback_that_could_not_be_published_does_not_count():
    quota = Quota()
    with pytest.raises(BrokerUnavailable):
        quota.take("a", "run", 0, ["0"] * 4, BrokerUnavailable("gone"))
    quota.take("a", "run", 1, ["1.0", "1.1"])
    quota.take("a", "run", 2, ["2.0", "2.1"])


def test_units_that_are_answered_are_forgotten_and_lost_ones_after_a_time():
    quota = Quota()
    for feedback in range(50):
        quota.take("a", "run", feedback, [f"{feedback}.{unit}" for unit in range(3)])
        quota.done |= {f"{feedback}.{unit}" for unit in range(3)}
    assert max(quota.asked_for) == 3
    quota.take("a", "run", 50, ["lost"] * 4)
    with pytest.raises(QueueFull):
        quota.take("a", "run", 51, ["51"])
    quota.now = FORGOTTEN_S
    quota.take("a", "run", 51, ["51"])


def test_a_callers_feedback_is_refused_while_its_units_wait(tmp_path: Path, dit_settings: dict, queue_url: str):
    service = make_service(tmp_path, queue_url, **dit_settings, limits={"feedback_units": 3})
    with started(service), served(service) as url, httpx.Client(base_url=url) as client:
        service._workers.ask_to_stop()
        service._workers.join()

        def post(feedback: int) -> httpx.Response:
            shortage = {"label": 0, "class_name": "alpha", "images": 8}  # two units of four
            body = {"run": "r", "feedback": feedback, "model_version": 0, "classes": [shortage]}
            return client.post("/v1/feedback", json=body)

        assert post(0).json()["units"] == 2
        assert "2 work units of yours" in problem(post(1), 429, "queue_full")
        assert post(0).status_code == 202


def test_an_adaptation_wants_the_admin_key(serve: Callable):
    with serve(api_key="hush", admin_key="boss") as (_, http), http("hush") as user, http("boss") as admin:
        job = {"type": "adapt", "name": "x"}
        assert "ONTHEFLY_ADMIN_KEY" in problem(user.post("/v1/jobs", json=job), 403, "forbidden")
        assert "generator.dataset" in problem(admin.post("/v1/jobs", json=job), 422, "invalid_request")
        problem(user.post("/v1/weights/base/activate"), 403, "forbidden")
        assert admin.post("/v1/weights/base/activate").status_code == 200


def test_one_callers_idempotency_key_is_not_anothers(serve: Callable):
    with serve(keys={"alice": "rabbit", "bob": "hatter"}) as (_, http), http("rabbit") as alice, http("hatter") as bob:
        key = {"Idempotency-Key": "k"}
        first = alice.post(IMAGES, json={"prompt": "alpha"}, headers=key)
        assert bob.post(IMAGES, json={"prompt": "beta"}, headers=key).status_code == 200
        assert alice.post(IMAGES, json={"prompt": "alpha"}, headers=key).content == first.content


def test_results_of_jobs_are_kept_up_to_a_size(serve: Callable):
    with serve(limits={"job_results_bytes": 5000}) as (_, http), http() as client:
        ids = []
        for _ in range(8):
            job = client.post("/v1/jobs", json={"type": "generate", "request": {"prompt": "alpha", "n": 3}}).json()
            client.get(f"/v1/jobs/{job['id']}/events")
            ids.append(job["id"])
        kept = [entry["id"] for entry in client.get("/v1/jobs").json()["data"]]
        assert 1 < len(kept) < 8 and kept == ids[-len(kept) :]


# ---------------------------------------------------------------- bodies


def test_room_for_bodies_is_given_back():
    bodies = Bodies(100)
    with bodies.one() as keep:
        assert keep(60) and not keep(60) and keep(40)
        with bodies.one() as other:
            assert not other(1)
    with bodies.one() as keep:
        assert keep(100)


def test_many_values_are_refused_and_long_texts_are_not():
    check_values(b'"' + b"x" * 10**6 + b'"', 1000)
    for body in (b"[" + b"0," * 1001 + b"0]", b"[" * 1001, b"[" + b"{}," * 500 + b"0]"):
        with pytest.raises(BodyTooLarge):
            check_values(body, 1000)


def test_feedback_may_be_larger_than_other_bodies(serve: Callable):
    with serve(max_body_bytes=2000, max_feedback_bytes=20_000) as (_, http), http() as client:
        large = json.dumps({"prompt": "x" * 10_000}).encode()
        json_type = {"Content-Type": "application/json"}
        assert "max_body_bytes" in problem(client.post(IMAGES, content=large, headers=json_type), 413, "body_too_large")
        problem(client.post("/v1/feedback", content=large, headers=json_type), 422, "invalid_request")
        assert "max_feedback_bytes" in problem(client.post("/v1/feedback", content=large * 3), 413, "body_too_large")


def test_more_large_bodies_than_there_is_room_for_are_told_to_come_back(serve: Callable):
    with serve(limits={"bodies_bytes": 2**16}) as (_, http), http() as client:
        refused = client.post(IMAGES, json={"prompt": "x" * 100_000})
        problem(refused, 503, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        assert client.post(IMAGES, json={"prompt": "alpha"}).status_code == 200


def test_a_body_that_does_not_arrive_is_given_up(serve: Callable):
    begun = f"POST {IMAGES} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{{".encode()
    with serve(limits={"body_s": 0.2}) as (_, http), http() as client:
        address = (client.base_url.host, client.base_url.port)
        with socket.create_connection(address) as connection:
            connection.sendall(begun)
            assert connection.recv(4096).startswith(b"HTTP/1.1 408")


def where() -> str:
    """Whether what asks runs on an event loop, and so holds everybody up, or in a thread of its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return "thread"
    return "event loop"


LONG, MANY = '[{"pixels": "' + "A" * (48 * 2**20) + '"}]', "[" + "[]," * (16 * 2**20) + "0]"


@pytest.mark.parametrize(
    ("samples", "status", "kind"),
    [(LONG, 422, "application/json"), (MANY, 413, "application/json"), (MANY, 413, "Application/x+JSON")],
    ids=["long", "many", "other case"],
)
def test_a_large_body_is_parsed_beside_the_event_loop(
    serve: Callable, monkeypatch: pytest.MonkeyPatch, samples: str, status: int, kind: str
):
    parsed: list[tuple[int, str]] = []
    parse = json_route._parse

    def observed(body: bytes, limit: int) -> Any:
        parsed.append((len(body), where()))
        return parse(body, limit)

    monkeypatch.setattr(json_route, "_parse", observed)
    with serve() as (_, http), http() as client, http() as other:
        body, answers = f'{{"samples": {samples}}}'.encode(), []

        def post() -> None:
            headers = {"Content-Type": kind}
            answers.append(client.post("/v1/feedback", content=body, headers=headers, timeout=60))

        posting = threading.Thread(target=post)
        posting.start()
        while posting.is_alive():
            assert other.get("/livez").status_code == 200
        assert answers[0].status_code == status
    assert parsed == [(len(body), "thread")]


# ---------------------------------------------------------------- images


def png(width: int, height: int) -> bytes:
    """A file that says it has so many pixels, and has none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def saved(kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(out, kind, **({"append_images": frames[1:]} if options.get("save_all") else {}), **options)
    return out.getvalue()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (png(5000, 5000), "25000000|5000 x 5000"),
        (png(60_000, 60_000), "too large"),
        (png(8, 8), "truncated or damaged"),
        (saved("PNG")[:50], "truncated or damaged"),
        (saved("GIF"), "not an image of a known format"),
        (saved("BMP"), "not an image of a known format"),
        (saved("TIFF"), "not an image of a known format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image of a known format"),
    ],
    ids=["declared", "bomb", "no pixels", "cut", "gif", "bmp", "tiff", "svg"],
)
def test_a_bad_init_image_is_refused(serve: Callable, data: bytes, said: str):
    with serve() as (_, http), http() as client:
        body = {"prompt": "alpha", "image": base64.b64encode(data).decode(), "strength": 0.5}
        answer = client.post(IMAGES, json=body)
        assert any(part in problem(answer, 422, "invalid_image") for part in said.split("|"))


@pytest.mark.parametrize("kind", ["WEBP", "PNG"])
def test_of_an_animated_image_the_first_frame_is_taken_at_the_models_size(serve: Callable, kind: str):
    with serve() as (service, http), http() as client:
        seen: list[np.ndarray] = []
        generate = scripted(service).generate
        scripted(service).generate = lambda w, rows, *rest: (seen.append(rows[0].image), generate(w, rows, *rest))[1]
        image = base64.b64encode(saved(kind, save_all=True)).decode()
        assert client.post(IMAGES, json={"prompt": "alpha", "image": image}).status_code == 200
        assert seen[0].shape == (8, 8, 3) and seen[0][0, 0, 0] > 200 > 50 > seen[0][0, 0, 2]


# ---------------------------------------------------------------- values and links


@pytest.mark.parametrize(
    "fields",
    [
        {"n": True},
        {"n": "2"},
        {"n": 2.0},
        {"seed": "5"},
        {"guidance_scale": True},
        {"stream": 0},
        {"class_label": True},
    ],
    ids=str,
)
def test_nothing_is_taken_for_a_number_that_is_none(serve: Callable, fields: dict):
    with serve() as (_, http), http() as client:
        problem(client.post(IMAGES, json={"prompt": "alpha"} | fields), 422, "invalid_request", next(iter(fields)))


def test_links_are_to_where_the_request_came_in_whatever_its_host_header_says(serve: Callable):
    with serve() as (_, http), http() as client:
        body = {"prompt": "alpha", "response_format": "url"}
        link = client.post(IMAGES, json=body, headers={"Host": "localhost"}).json()["data"][0]["url"]
        assert link.startswith(f"{client.base_url}".rstrip("/") + "/v1/samples/")
        assert httpx.get(link).content.startswith(b"\x89PNG")


def test_links_are_to_the_public_address_where_there_is_one(serve: Callable):
    with serve(public_url="https://images.example") as (_, http), http() as client:
        body = {"prompt": "alpha", "response_format": "url"}
        link = client.post(IMAGES, json=body).json()["data"][0]["url"]
        assert link.startswith("https://images.example/v1/samples/")
        job = client.post("/v1/jobs", json={"type": "generate", "request": body}).json()["id"]
        client.get(f"/v1/jobs/{job}/events")
        assert client.get(f"/v1/jobs/{job}").json()["result"]["data"][0]["url"].startswith("https://images.example/")


# ---------------------------------------------------------------- events


def test_events_that_are_gone_are_told(serve: Callable):
    with serve(images={"steps": 1000}) as (service, http), http() as client:
        service.jobs._max_events = 10
        job = client.post("/v1/jobs", json={"type": "generate", "request": {"prompt": "alpha"}}).json()["id"]
        while service.jobs.get(job).job.status != "succeeded":
            time.sleep(0.01)
        text = client.get(f"/v1/jobs/{job}/events", headers={"Last-Event-ID": "5"}).text
        found = [JobEvent.model_validate_json(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
        assert found[0].kind == "skipped" and found[0].data == {"first": 6, "last": found[1].seq - 1}
        assert [event.seq for event in found] == list(range(found[0].seq, found[0].seq + 11))
        beyond = client.get(f"/v1/jobs/{job}/events", headers={"Last-Event-ID": "99999"})
        problem(beyond, 422, "invalid_request", "Last-Event-ID")


# ---------------------------------------------------------------- connections


@pytest.fixture(params=[0.5])
def bounded(tmp_path: Path, scripted_settings: dict, request: pytest.FixtureRequest) -> Iterator[tuple[str, int]]:
    """The address of the server as it is launched: three connections, so many seconds for a request's head."""
    service = make_service(tmp_path, **scripted_settings, limits={"connections": 3, "head_s": request.param})
    with started(service), socket.create_server(("127.0.0.1", 0)) as listener:
        server: uvicorn.Server = Server(service)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield listener.getsockname()
        server.should_exit = True
        thread.join()


@pytest.mark.parametrize("sent", [b"", b"GET /livez HTTP/1.1\r\nHost: loc", b"GET /livez HTTP/1.1\r\n\r\n_"])
def test_a_connection_that_does_not_say_what_it_wants_is_closed(bounded: tuple[str, int], sent: bytes):
    whole = sent.removesuffix(b"_")
    with socket.create_connection(bounded) as connection:
        connection.settimeout(30)
        connection.sendall(whole.replace(b"1.1\r\n\r\n", b"1.1\r\nHost: localhost\r\n\r\n"))
        if sent.endswith(b"_"):
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
            connection.sendall(b"GET /li")
        while connection.recv(4096):  # until the server closes it
            pass


@pytest.mark.parametrize("bounded", [60.0], indirect=True)
def test_one_connection_more_is_told_to_come_back(bounded: tuple[str, int]):
    held = [socket.create_connection(bounded) for _ in range(3)]
    url = "http://{}:{}".format(*bounded)
    answer = httpx.get(f"{url}/livez")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    for connection in held:
        connection.close()
    while httpx.get(f"{url}/livez").status_code == 503:
        time.sleep(0.05)


def test_a_request_that_takes_long_is_not_cut(bounded: tuple[str, int]):
    with httpx.Client(base_url="http://{}:{}".format(*bounded), timeout=30) as client:
        for _ in range(3):
            assert client.post(IMAGES, json={"prompt": "alpha", "num_inference_steps": 500}).status_code == 200
            time.sleep(0.3)
