"""Both clients with several replicas: who is asked, and who is asked next."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import httpx
import pytest

from protocol.client import GeneratorClient
from protocol.client_async import AsyncGeneratorClient
from protocol.errors import ConfigError, NotReady, ServiceUnreachable, UnknownJob
from protocol.messages import AdaptJob, Feedback, Job, JobList

URLS = ["http://a:1", "http://b:1", "http://c:1"]
FEEDBACK = Feedback.model_validate({"run": "r", "feedback": 0, "model_version": 0, "classes": [
    {"label": 0, "class_name": "x", "images": 1}
]})  # fmt: skip
ACCEPTED = {"run": "r", "feedback": 0, "units": 0, "samples": 0,
            "weights": {"name": "w", "version": 1, "digest": "d"}}  # fmt: skip


class Hosts:
    """What each host does; an exception is raised, anything else answered."""

    def __init__(self) -> None:
        self.does: dict[str, httpx.Response | Exception] = {}
        self.asked: list[str] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request.url.host)
        outcome = self.does.get(request.url.host, httpx.Response(200, json=JobList(data=[]).model_dump()))
        if isinstance(outcome, Exception):
            raise outcome
        return httpx.Response(outcome.status_code, content=outcome.content)


@pytest.fixture
def hosts() -> Hosts:
    return Hosts()


Ask = Callable[..., object]


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest, hosts: Hosts):
    """Calls a method by name."""
    transport = httpx.MockTransport(hosts)
    if request.param == "sync":
        client = GeneratorClient(URLS, transport=transport, retries=0)
        yield lambda name, *args: getattr(client, name)(*args)
        client.close()
        return
    with asyncio.Runner() as runner:
        aclient = AsyncGeneratorClient(URLS, transport=transport, retries=0)
        yield lambda name, *args: runner.run(getattr(aclient, name)(*args))
        runner.run(aclient.close())


def test_the_next_one_is_asked_and_remembered(ask: Ask, hosts: Hosts) -> None:
    hosts.does = {"a": httpx.ConnectError("refused"), "b": httpx.ReadTimeout("hangs")}
    ask("jobs")
    ask("jobs")
    assert hosts.asked == ["a", "b", "c", "c"]
    hosts.does["c"] = httpx.ConnectError("refused")
    del hosts.does["b"]
    ask("jobs")
    assert hosts.asked[4:] == ["c", "a", "b"]


def test_one_that_loads_is_passed_over(ask: Ask, hosts: Hosts) -> None:
    hosts.does = {"a": httpx.Response(503, json=NotReady("the model is loading").to_problem())}
    hosts.does["b"] = httpx.Response(202, json=ACCEPTED)
    ask("feedback", FEEDBACK)
    assert hosts.asked == ["a", "b"]
    assert ask("ready") is True


def test_the_last_error_is_raised_when_none_answers(ask: Ask, hosts: Hosts) -> None:
    hosts.does = {host: httpx.ConnectError("refused") for host in "abc"}
    with pytest.raises(ServiceUnreachable, match="http://c:1"):
        ask("feedback", FEEDBACK)
    assert hosts.asked == ["a", "b", "c"]


def test_an_answer_is_an_answer_even_when_it_is_a_refusal(ask: Ask, hosts: Hosts) -> None:
    hosts.does = {"a": httpx.Response(404, json=UnknownJob("no such job").to_problem())}
    with pytest.raises(UnknownJob):
        ask("job", "x")
    assert hosts.asked == ["a"]


@pytest.mark.parametrize(
    ("error", "asked"), [(httpx.ConnectError("refused"), ["a", "b"]), (httpx.ReadError("reset"), ["a"])]
)
def test_a_job_that_may_have_begun_is_not_begun_twice(
    ask: Ask, hosts: Hosts, error: httpx.RequestError, asked: list[str]
) -> None:
    hosts.does = {"a": error, "b": httpx.Response(404, json=UnknownJob("b was asked").to_problem())}
    with pytest.raises(ServiceUnreachable if asked == ["a"] else UnknownJob):
        ask("submit", AdaptJob(name="x"))
    assert hosts.asked == asked


def test_a_job_is_asked_after_where_it_was_begun(ask: Ask, hosts: Hosts) -> None:
    job = Job(id="j", type="adapt", status="running", created=0.0)
    hosts.does = {"a": httpx.ConnectError("refused"), "b": httpx.Response(202, json=job.model_dump())}
    ask("submit", AdaptJob(name="x"))
    hosts.does["b"] = httpx.ConnectError("refused")
    ask("jobs")
    for name in ("job", "cancel"):
        with pytest.raises(ServiceUnreachable, match="http://b:1"):
            ask(name, "j")
    assert hosts.asked == ["a", "b", "b", "c", "b", "b"]


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(ConfigError, match="no address"):
        GeneratorClient([])
