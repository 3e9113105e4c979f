"""Both clients against a real FastAPI app: over real HTTP, and over httpx's ASGI transport."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse

from protocol import client_calls, errors
from protocol.client import GeneratorClient
from protocol.client_async import AsyncGeneratorClient
from protocol.entries import Sample
from protocol.messages import (
    AdaptJob,
    ClassShortage,
    Feedback,
    FeedbackAccepted,
    GeneratedImage,
    GenerateJob,
    ImageGenerationRequest,
    ImagesResponse,
    Job,
    JobEvent,
    JobList,
    WeightsInfo,
    WeightsList,
)
from tests.protocol.messages_to_send import WEIGHTS, reply

IMAGES = ImagesResponse(
    created=1,
    data=[GeneratedImage(b64_json="aGk=", sample_id="s", seed=2**63 - 1)],
    output_format="png",
    size="8x8",
    weights=WEIGHTS,
)
JOB = Job(id="a/b ?", type="adapt", status="queued", created=1.5)
INFO = WeightsInfo(
    **WEIGHTS.model_dump(), backend="dit", kind="full", base=None, classes=["a"], created=1.0, active=True
)
SAMPLE = Sample(
    id="s é",
    run=None,
    feedback=None,
    model_version=None,
    source_id=None,
    index=0,
    seed=1,
    label=0,
    class_name="a",
    prompt="\u2028 line separators are text",
    guidance_scale=1.0,
    steps=5,
    scheduler="ddim",
    strength=1.0,
    weights=WEIGHTS,
    created=1.0,
)
REQUEST = ImageGenerationRequest(prompt="a", seed=3, class_label="é")
FEEDBACK = Feedback(run="r", feedback=0, model_version=7, classes=[ClassShortage(label=0, class_name="a", images=2)])


class Service:
    """A stub of the service that keeps what it was asked and answers with the fixed messages above."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, Any, dict[str, str]]] = []
        self.ready = True
        self.events: list[list[bytes]] = []  # one list of chunks for each connection
        self.fail: JSONResponse | HTMLResponse | None = None
        self.app = FastAPI()
        self.app.add_api_route("/{path:path}", self.answer, methods=["GET", "POST", "DELETE"])

    async def answer(self, request: Request):
        raw = await request.body()
        path = request.scope["raw_path"].decode().split("?")[0]
        self.seen.append((request.method, path, json.loads(raw) if raw else None, dict(request.headers)))
        if self.fail is not None:
            return self.fail
        if path == "/readyz":
            problem = errors.NotReady("warming up", retry_after=0.01).to_problem()
            return JSONResponse({}) if self.ready else JSONResponse(problem, 503)
        if path.endswith("/events"):
            return StreamingResponse(self.stream(self.events.pop(0)), media_type="text/event-stream")
        return JSONResponse(self.message(request.method, path).model_dump(mode="json"))

    @staticmethod
    async def stream(chunks: list[bytes]) -> AsyncIterator[bytes]:
        for chunk in chunks:
            if chunk == b"CUT":
                raise ConnectionResetError
            yield chunk

    @staticmethod
    def message(method: str, path: str):
        if path == "/v1/jobs":
            return JOB if method == "POST" else JobList(data=[JOB])
        if path == "/v1/weights":
            return WeightsList(active=WEIGHTS, data=[INFO])
        known = {
            "/v1/images/generations": IMAGES,
            "/v1/feedback": reply(),
            "/v1/jobs/": JOB,
            "/v1/weights/": INFO,
            "/v1/samples/": SAMPLE,
        }
        return next(message for start, message in known.items() if path.startswith(start))


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
def url(service: Service) -> Iterator[str]:
    """The stub behind a real HTTP server."""
    with socket.create_server(("127.0.0.1", 0)) as listener:  # it listens already: nobody is refused
        config = uvicorn.Config(service.app, log_level="critical", lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


class InProcess:
    """The async client over the ASGI transport, called like the sync one."""

    def __init__(self, service: Service, **options: Any):
        self._service, self._options = service, options

    def __getattr__(self, name: str) -> Callable:
        async def call(*args, **kwargs):
            transport = httpx.ASGITransport(self._service.app)
            async with AsyncGeneratorClient("http://service/v1/", transport=transport, **self._options) as client:
                result = getattr(client, name)(*args, **kwargs)
                return [event async for event in result] if name == "events" else await result

        return lambda *args, **kwargs: asyncio.run(call(*args, **kwargs))


@pytest.fixture(params=["sync over HTTP", "async in process"])
def client(request: pytest.FixtureRequest, service: Service):
    if request.param == "sync over HTTP":
        with GeneratorClient(request.getfixturevalue("url") + "/", api_key="key", retries=0) as made:
            yield made
    else:
        yield InProcess(service, api_key="key", retries=0)


# ---------------------------------------------------------------- calls


@pytest.mark.parametrize(
    ("name", "args", "asked", "body", "answer"),
    [
        ("generate", (REQUEST,), ("POST", "/v1/images/generations"), REQUEST, IMAGES),
        ("feedback", (FEEDBACK,), ("POST", "/v1/feedback"), FEEDBACK, reply()),
        ("submit", (AdaptJob(name="x"),), ("POST", "/v1/jobs"), AdaptJob(name="x"), JOB),
        ("submit", (GenerateJob(request=REQUEST),), ("POST", "/v1/jobs"), GenerateJob(request=REQUEST), JOB),
        ("job", (JOB.id,), ("GET", "/v1/jobs/a%2Fb%20%3F"), None, JOB),
        ("jobs", (), ("GET", "/v1/jobs"), None, JobList(data=[JOB])),
        ("cancel", (JOB.id,), ("DELETE", "/v1/jobs/a%2Fb%20%3F"), None, JOB),
        ("weights", (), ("GET", "/v1/weights"), None, WeightsList(active=WEIGHTS, data=[INFO])),
        ("activate", ("digits", 3), ("POST", "/v1/weights/digits/activate"), {"version": 3}, INFO),
        ("activate", ("digits",), ("POST", "/v1/weights/digits/activate"), {"version": None}, INFO),
        ("sample", (SAMPLE.id,), ("GET", "/v1/samples/s%20%C3%A9"), None, SAMPLE),
    ],
)
def test_each_call_asks_and_reads_what_the_contract_says(client, service, name, args, asked, body, answer) -> None:
    assert getattr(client, name)(*args) == answer
    [(method, path, sent, headers)] = service.seen
    assert (method, path) == asked
    assert headers["authorization"] == "Bearer key" and "idempotency-key" not in headers
    if isinstance(body, dict | None):
        assert sent == body
    else:
        assert type(body).model_validate(sent) == body


@pytest.mark.parametrize(
    ("name", "body"), [("generate", REQUEST), ("feedback", FEEDBACK), ("submit", AdaptJob(name="x"))]
)
def test_an_idempotency_key_is_sent(client, service: Service, name: str, body) -> None:
    getattr(client, name)(body, idempotency_key="once")
    assert service.seen[0][3]["idempotency-key"] == "once"


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("header", [{}, {"Retry-After": "2.5"}, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}])
def test_a_problem_is_raised_as_the_error_it_stands_for(client, service: Service, header: dict[str, str]) -> None:
    refused = errors.QueueFull("full: later", param="samples")
    service.fail = JSONResponse(refused.to_problem(), 429, headers=header)
    with pytest.raises(errors.QueueFull, match="full: later") as raised:
        client.feedback(FEEDBACK)
    assert raised.value.param == "samples"
    assert raised.value.retry_after == (2.5 if header.get("Retry-After") == "2.5" else 1.0)


@pytest.mark.parametrize(
    "response",
    [HTMLResponse("<h1>Bad Gateway</h1>", 502), JSONResponse({"detail": "Not Found"}, 404), JSONResponse(["?"], 500)],
)
def test_an_answer_of_something_else_says_so(client, service: Service, response) -> None:
    service.fail = response
    with pytest.raises(errors.ServiceUnreachable, match=f"status {response.status_code} and no problem document"):
        client.weights()


@pytest.mark.parametrize("response", [HTMLResponse("<h1>Welcome</h1>"), JSONResponse({"object": "list"})])
def test_a_success_of_something_else_says_so(client, service: Service, response) -> None:
    service.fail = response
    with pytest.raises(errors.ServiceUnreachable, match="not a WeightsList: check"):
        client.weights()


def test_a_service_that_is_not_there_is_named_without_credentials() -> None:
    with GeneratorClient("http://user:sesame@127.0.0.1:1", retries=0) as client:
        with pytest.raises(errors.ServiceUnreachable, match=r"@127\.0\.0\.1:1 .*start it") as raised:
            client.weights()
        assert "sesame" not in raised.value.message
        assert client.ready() is False
        with pytest.raises(errors.ServiceUnreachable, match="start it"):
            client.wait_ready(0)


def test_a_service_that_hangs_is_unreachable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with (
            GeneratorClient(address, timeout=0.1, retries=0) as client,
            pytest.raises(errors.ServiceUnreachable, match="timed out"),
        ):
            client.weights()


@pytest.mark.parametrize(
    "address", ["127.0.0.1:8000", "ftp://host", "", "http://127.0.0.1:80a", "http://[::1", "http://xn--a.b"]
)
@pytest.mark.parametrize("kind", [GeneratorClient, AsyncGeneratorClient])
def test_an_address_that_is_no_url_is_refused(kind: type, address: str) -> None:
    with pytest.raises(errors.ConfigError, match="http://host:port") as refused:
        kind(address)
    assert repr(address) in refused.value.message


def test_an_address_that_is_no_url_is_named_without_its_password() -> None:
    with pytest.raises(errors.ConfigError, match=r"@host") as refused:
        GeneratorClient("http://user:ses/ame@host")
    assert "ses" not in refused.value.message.replace("service's address", "") and refused.value.__suppress_context__


@pytest.mark.parametrize("key", ["s\u00e9same", "sesame\n", " sesame", "sesame ", "ses\x00ame", ""])
@pytest.mark.parametrize("kind", [GeneratorClient, AsyncGeneratorClient])
def test_a_key_that_no_header_can_carry_is_refused_and_not_quoted(kind: type, key: str) -> None:
    with pytest.raises(errors.ConfigError, match="ONTHEFLY_API_KEY") as refused:
        kind("http://host", api_key=key)
    assert "same" not in refused.value.message


def test_proxies_of_the_environment_do_not_come_between_this_machine_and_itself(
    monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "")
    with GeneratorClient(url) as client:
        assert client.jobs() == JobList(data=[JOB])


# ---------------------------------------------------------------- readiness


def test_waiting_until_ready(url: str, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    service.ready = False
    with GeneratorClient(url) as client:
        assert client.ready() is False
        with pytest.raises(errors.NotReady, match="warming up"):
            client.wait_ready(0)
        asked = len(service.seen)
        waiting = threading.Thread(target=client.wait_ready, args=(60,))
        waiting.start()
        while len(service.seen) < asked + 2:
            assert waiting.is_alive()
        service.ready = True
        waiting.join()
        assert client.ready() is True


def test_waiting_until_ready_in_process(service: Service) -> None:
    client = InProcess(service)
    assert client.ready() is True and client.wait_ready() is None
    service.ready = False
    with pytest.raises(errors.NotReady):
        client.wait_ready(0)


# ---------------------------------------------------------------- events


def event(seq: int, kind: str = "progress") -> JobEvent:
    return JobEvent(seq=seq, job=JOB.id, kind=kind, time=float(seq), data={"step": seq, "note": "\u2028 \x85 é"})


def sse(*events: JobEvent) -> bytes:
    return b"".join(f"id: {e.seq}\nevent: {e.kind}\ndata: {e.model_dump_json()}\n\n".encode() for e in events)


def test_events_come_however_the_bytes_are_cut(client, service: Service) -> None:
    wire = b": hello\n\n" + sse(event(1), event(2)) + sse(event(3, "end")).replace(b"\n", b"\r\n")
    service.events = [[wire[place : place + 1] for place in range(len(wire))], [wire]]
    expected = [event(1), event(2), event(3, "end")]
    assert list(client.events(JOB.id)) == expected
    assert list(client.events(JOB.id)) == expected
    assert service.seen[0][1] == "/v1/jobs/a%2Fb%20%3F/events"
    assert "last-event-id" not in service.seen[0][3]


def test_one_document_may_take_several_data_lines(client, service: Service) -> None:
    lines = event(1, "end").model_dump_json(indent=1).split("\n")
    service.events = [["".join(f"data: {line}\n" for line in lines).encode() + b"\n"]]
    assert list(client.events(JOB.id, after=7)) == [event(1, "end")]
    assert service.seen[0][3]["last-event-id"] == "7"


def test_a_stream_that_closes_or_breaks_is_resumed_after_the_last_event(
    url: str, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_calls, "_EVENT_DELAY_S", 0.0)
    half = sse(event(3))
    service.events = [[sse(event(1), event(2)), half[:20]], [half, b"CUT"], [], [sse(event(4, "end"))]]
    with GeneratorClient(url) as client:
        assert [e.seq for e in client.events(JOB.id)] == [1, 2, 3, 4]
    assert [headers.get("last-event-id") for *_, headers in service.seen] == [None, "2", "3", "3"]


def test_a_stream_that_never_says_anything_is_given_up(client, service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_calls, "_EVENT_DELAY_S", 0.0)
    service.events = [[b": only comments\n\n"]] * 5
    with pytest.raises(errors.ServiceUnreachable, match="event stream keeps closing"):
        list(client.events(JOB.id))
    assert len(service.seen) == 5


def test_events_of_an_unknown_job_raise(client, service: Service) -> None:
    service.fail = JSONResponse(errors.UnknownJob("no such job").to_problem(), 404)
    with pytest.raises(errors.UnknownJob, match="no such job"):
        list(client.events("x"))


def test_the_sync_and_async_clients_offer_the_same() -> None:
    def offered(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")}

    assert offered(GeneratorClient) == offered(AsyncGeneratorClient)
    assert FeedbackAccepted.model_validate(reply().model_dump()) == reply()
