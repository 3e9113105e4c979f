"""When both clients ask again, how often, after which pauses, and with which idempotency keys."""

from __future__ import annotations

import asyncio
import inspect
import time
import typing
from collections.abc import Callable, Iterator

import httpx
import pytest

from protocol import client_http
from protocol.client import GeneratorClient
from protocol.client_async import AsyncGeneratorClient
from protocol.client_calls import Call
from protocol.client_http import Attempts
from protocol.errors import (
    GenerationFailed,
    NotReady,
    NotTheService,
    OnTheFlyError,
    QueueFull,
    Retryable,
    ServiceUnreachable,
    UnknownJob,
)
from protocol.messages import AdaptJob, JobList

JOB = {"id": "j", "type": "adapt", "status": "queued", "created": 1.0}


class Script:
    """Answers one after the other; an exception is raised. The last one is repeated."""

    def __init__(self, *outcomes: httpx.Response | Exception):
        self.outcomes, self.requests = list(outcomes), []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        outcome = self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]
        if isinstance(outcome, Exception):
            raise outcome
        return httpx.Response(outcome.status_code, headers=outcome.headers, content=outcome.content)

    @property
    def keys(self) -> list[str | None]:
        return [request.headers.get("idempotency-key") for request in self.requests]


def problem(error: OnTheFlyError, **headers: str) -> httpx.Response:
    return httpx.Response(error.status, json=error.to_problem(), headers=headers)


def answer(method: str) -> httpx.Response:
    return httpx.Response(200, json=JobList(data=[]).model_dump() if method == "jobs" else JOB)


FULL = problem(QueueFull("full"), **{"Retry-After": "0"})
ARGUMENTS = {"jobs": (), "submit": (AdaptJob(name="x"),), "cancel": ("j",)}


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_http, "_FIRST_PAUSE_S", 0.001)


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest) -> Iterator[Callable[..., object]]:
    """Calls a method by name against a script."""

    def call(script: Script, name: str, **options: typing.Any) -> object:
        transport = httpx.MockTransport(script)
        if request.param == "sync":
            with GeneratorClient("http://a:1", transport=transport, **options) as client:
                return getattr(client, name)(*ARGUMENTS[name])

        async def asynchronously() -> object:
            async with AsyncGeneratorClient("http://a:1", transport=transport, **options) as client:
                return await getattr(client, name)(*ARGUMENTS[name])

        return asyncio.run(asynchronously())

    return call


@pytest.mark.parametrize("name", ["jobs", "submit"])
@pytest.mark.parametrize(
    "failure",
    [FULL, *map(httpx.Response, (502, 503, 504)), httpx.ConnectError("no"), httpx.ReadError("cut")],
    ids=["429", "502", "503", "504", "connect", "read"],
)
def test_what_may_pass_is_asked_again_as_one_request(ask, name: str, failure: httpx.Response | Exception) -> None:
    if isinstance(failure, httpx.Response):
        failure.headers["Retry-After"] = "0"
    script = Script(failure, failure, answer(name))
    assert ask(script, name) is not None
    assert len(script.requests) == 3
    assert len(set(script.keys)) == 1
    assert (script.keys[0] is not None) == (name == "submit")


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (problem(GenerationFailed("broken")), GenerationFailed),
        (problem(UnknownJob("what?")), UnknownJob),
        (httpx.Response(404, text="<h1>elsewhere</h1>"), NotTheService),
        (httpx.Response(200, json={"no": "list"}), NotTheService),
    ],
    ids=["500", "404", "another service", "another answer"],
)
def test_what_stays_is_raised_at_once(ask, failure: httpx.Response, error: type) -> None:
    script = Script(failure)
    with pytest.raises(error):
        ask(script, "jobs")
    assert len(script.requests) == 1


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_the_last_error_is_raised_after_so_many_attempts(ask, retries: int) -> None:
    script = Script(FULL)
    with pytest.raises(QueueFull):
        ask(script, "submit", retries=retries)
    assert len(script.requests) == retries + 1
    assert (script.keys[0] is None) == (retries == 0)


@pytest.mark.parametrize(("failure", "asked"), [(httpx.ReadError("cut"), 1), (httpx.ConnectError("no"), 3), (FULL, 3)])
def test_a_delete_that_may_have_been_done_is_not_repeated(ask, failure: httpx.Response | Exception, asked: int) -> None:
    script = Script(failure)
    with pytest.raises(Retryable):
        ask(script, "cancel", retries=2)
    assert len(script.requests) == asked


def test_a_pause_that_the_deadline_does_not_leave_is_not_begun(ask) -> None:
    script, began = Script(problem(NotReady("loading"), **{"Retry-After": "60"})), time.monotonic()
    with pytest.raises(NotReady):
        ask(script, "jobs", deadline=5.0)
    assert len(script.requests) == 1 and time.monotonic() - began < 4.0


def test_the_deadline_bounds_an_attempt_too() -> None:
    attempts = Attempts(Call("GET", "/v1/jobs", JobList), 3, deadline_s=2.0)
    bounded = attempts.timeout(httpx.Timeout(300.0, connect=1.0))
    assert 1.0 < bounded.read <= 2.0 and bounded.connect == 1.0


def test_pauses_grow_are_random_and_never_shorter_than_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_http, "_FIRST_PAUSE_S", 0.25)
    call = Call("GET", "/v1/jobs", JobList)

    def pauses(error: Retryable) -> list[float]:
        attempts = Attempts(call, 8, deadline_s=1000.0)
        return [attempts.delay(error) for _ in range(8)]

    many = [pauses(QueueFull("full", retry_after=None)) for _ in range(50)]
    for number, longest in enumerate([0.25, 0.5, 1, 2, 4, 8, 8, 8]):
        drawn = [one[number] for one in many]
        assert longest / 2 <= min(drawn) < max(drawn) <= longest
    assert min(pauses(QueueFull("full", retry_after=30.0))) >= 30.0


@pytest.mark.parametrize("kind", [GeneratorClient, AsyncGeneratorClient])
def test_a_key_of_the_callers_own_is_used(kind: type) -> None:
    script = Script(FULL, answer("submit"))
    client = kind("http://a:1", transport=httpx.MockTransport(script))
    result = client.submit(AdaptJob(name="x"), idempotency_key="mine")
    if inspect.isawaitable(result):
        asyncio.run(typing.cast(typing.Any, result))
    assert script.keys == ["mine", "mine"]


def test_both_clients_say_the_same_with_types() -> None:
    def surface(kind: type) -> dict[str, object]:
        found = {}
        for name, method in inspect.getmembers(kind, inspect.isfunction):
            if name == "__init__" or not name.startswith("_"):
                hints = typing.get_type_hints(method)
                told = set(inspect.signature(method).parameters) - {"self"} | (
                    set() if name == "__init__" else {"return"}
                )
                assert hints.keys() == told, name
                hints.pop("transport", None)
                found[name] = hints if name != "events" else sorted(hints)
        return found

    assert surface(GeneratorClient) == surface(AsyncGeneratorClient)


def test_an_unreachable_service_is_unreachable_after_its_retries(ask) -> None:
    with pytest.raises(ServiceUnreachable, match="start it"):
        ask(Script(httpx.ConnectError("refused")), "jobs", retries=1)
