"""The client of OpenAI-compatible endpoints, against a real HTTP server."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.utils import formatdate

import pytest

from agent import language
from agent.language import OpenAIChat, OpenAIConfig
from agent.rest import FIRST_S
from protocol.errors import ConfigError, LanguageUnavailable
from tests.agent.clock import Clock
from tests.agent.fake_endpoint import Reply, endpoint, said

ASKED = [{"role": "system", "content": "be short"}, {"role": "user", "content": "hello"}]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "FIRST_PAUSE_S", 0.01)
    for name in language.KEY_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@contextmanager
def chat(url: str, clock: Callable[[], float] = time.monotonic, **settings) -> Iterator[OpenAIChat]:
    made = OpenAIChat(OpenAIConfig(url=url, model="llama", **settings), clock)
    try:
        yield made
    finally:
        made.close()


def one(asked: OpenAIChat) -> str | LanguageUnavailable:
    (answer,) = asked.complete([ASKED], [7])
    return answer


def error(asked: OpenAIChat) -> LanguageUnavailable:
    answer = one(asked)
    assert isinstance(answer, LanguageUnavailable), answer
    return answer


def test_what_is_sent_and_what_comes_back():
    with (
        endpoint(lambda body: said("hi")) as server,
        chat(server.url + "/", api_key="s3cret", temperature=0.2, max_tokens=9, extra={"top_p": 0.5}) as asked,
    ):
        assert one(asked) == "hi"
    (body,) = server.bodies
    assert body == {
        "path": "/v1/chat/completions",
        "model": "llama",
        "messages": ASKED,
        "temperature": 0.2,
        "max_tokens": 9,
        "seed": 7,
        "top_p": 0.5,
    }
    assert server.headers[0]["Authorization"] == "Bearer s3cret"


def test_what_is_not_set_is_not_sent(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", "from-the-environment")
    with (
        endpoint(lambda body: said(None)) as server,
        chat(server.url, temperature=None, max_tokens=None, seeded=False) as asked,
    ):
        assert one(asked) == ""  # a refusal is an empty answer
    assert server.bodies[0].keys() == {"path", "model", "messages"}
    assert server.headers[0]["Authorization"] == "Bearer from-the-environment"


def test_answers_keep_the_order_of_the_questions_at_the_concurrency_that_is_set():
    together = threading.Barrier(3)

    def answer(body):
        together.wait(timeout=30)  # three are inside at a time, or this never ends
        return said(body["messages"][0]["content"])

    questions = [[{"role": "user", "content": str(number)}] for number in range(12)]
    with endpoint(answer) as server, chat(server.url, concurrency=3) as asked:
        assert asked.complete(questions, range(12)) == [str(number) for number in range(12)]
    assert server.most_at_once == 3


@pytest.mark.parametrize("status", [429, 500, 503])
def test_failures_that_may_pass_are_asked_again(status: int):
    count = itertools.count()
    with (
        endpoint(lambda body: said("at last") if next(count) == 2 else Reply(b"busy", status)) as server,
        chat(server.url, retries=2) as asked,
    ):
        assert one(asked) == "at last"
    assert len(server.bodies) == 3


def test_a_question_that_is_refused_is_an_error_in_its_place():
    def answer(body):
        return Reply(b"rude", 400) if body["messages"][0]["content"] == "1" else said("fine")

    questions = [[{"role": "user", "content": str(number)}] for number in range(3)]
    with endpoint(answer) as server, chat(server.url, concurrency=1) as asked:
        first, second, third = asked.complete(questions, range(3))
    assert (first, third) == ("fine", "fine")
    assert isinstance(second, LanguageUnavailable) and "status 400: rude" in second.message
    assert len(server.bodies) == 3


@pytest.mark.parametrize("quoted", ["Bearer hunter2", "hunter2", "'hunter2'", " " * 195 + "hunter2"])
def test_wrong_keys_are_told_at_once_and_never_quoted(quoted: str):
    with (
        endpoint(lambda body: Reply(f"bad key {quoted}".encode(), 401)) as server,
        chat(server.url, retries=5, api_key="hunter2") as asked,
    ):
        found = error(asked)
    assert len(server.bodies) == 1
    assert "status 401: bad key" in found.message and "api_key" in found.message and "hunt" not in found.message


# ---------------------------------------------------------------- rests


@pytest.mark.parametrize(("reply", "attempts"), [(Reply(b"out", 500), 2), (Reply(b"who", 401), 1), (Reply(b"{}"), 2)])
def test_an_endpoint_that_fails_is_left_alone_by_who_waits_already(reply: Reply, attempts: int):
    clock, down = Clock(), True
    with (
        endpoint(lambda body: reply if down else said("hi")) as server,
        chat(server.url, clock, concurrency=1, retries=1) as asked,
    ):
        answers = asked.complete([ASKED] * 20, range(20))
        assert len(server.bodies) == attempts and {answer.message for answer in answers} == {answers[0].message}
        clock.now += FIRST_S
        asked.complete([ASKED] * 20, range(20))
        assert len(server.bodies) == attempts + 1  # one asks, once
        clock.now += FIRST_S
        asked.complete([ASKED] * 20, range(20))
        assert len(server.bodies) == attempts + 1
        down, clock.now = False, clock.now + FIRST_S
        assert asked.complete([ASKED] * 20, range(20)) == ["hi"] * 20


def test_silence_is_not_asked_again_nor_by_who_waits_already():
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"http://127.0.0.1:{mute.getsockname()[1]}/v1"
        with chat(url, Clock(), retries=3, concurrency=1, timeout_s=0.05) as asked:
            answers = asked.complete([ASKED] * 5, range(5))
        mute.settimeout(0.0)
        connections = [mute.accept()[0]]
        with pytest.raises(BlockingIOError):
            mute.accept()
        connections[0].close()
    assert all("does not answer within 0.05 s" in answer.message for answer in answers)


BEGINNING = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n"


def test_an_answer_that_does_not_end_is_given_up():
    with going_on(b" ", 0.02) as server, chat(server.url, timeout_s=0.3) as asked:
        assert "does not come to an end" in error(asked).message
    assert server.sent < 500


def test_an_answer_that_is_too_long_is_given_up_before_its_end():
    with going_on(b"x" * 2**18, 0.0) as server, chat(server.url, retries=0) as asked:
        assert "more than 1048576 bytes" in error(asked).message
    assert server.sent < 500  # of 125 MiB; sockets hold some


@dataclass
class GoingOn:
    url: str
    sent: int = 0  # pieces


@contextmanager
def going_on(piece: bytes, pause_s: float) -> Iterator[GoingOn]:
    """A server that answers one asker with up to 500 pieces of a longer body, until the asker hangs up."""

    def serve() -> None:
        asker, _ = server.accept()
        with asker, suppress(OSError):
            asker.sendall(BEGINNING)
            while made.sent < 500:
                time.sleep(pause_s)
                asker.sendall(piece)
                made.sent += 1

    with socket.create_server(("127.0.0.1", 0)) as server:
        made = GoingOn(f"http://127.0.0.1:{server.getsockname()[1]}/v1")
        thread = threading.Thread(target=serve)
        thread.start()
        yield made
        thread.join()


@pytest.mark.parametrize("dated", [False, True])
def test_retry_after_is_waited_for(monkeypatch: pytest.MonkeyPatch, dated: bool):
    pauses: list[float] = []
    count = itertools.count()

    def answer(body):
        header = formatdate(time.time() + 41, usegmt=True) if dated else "40"
        return said("now") if next(count) else Reply(b"", 429, {"Retry-After": header})

    with endpoint(answer) as server, chat(server.url) as asked:
        monkeypatch.setattr(asked._closed, "wait", lambda pause: pauses.append(pause))
        assert one(asked) == "now"
    assert len(pauses) == 1 and 35 <= pauses[0] <= 41


def test_one_who_asks_for_too_much_patience_is_given_up():
    with endpoint(lambda body: Reply(b"", 429, {"Retry-After": "3600"})) as server, chat(server.url) as asked:
        assert error(asked).retry_after == 3600
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    "body", [b"<html>", b"{}", b"[]", b'{"choices": []}', b'{"choices": [{"message": 3}]}', b"\xff\xfe"]
)
def test_garbage_is_an_error(body: bytes):
    with endpoint(lambda asked: Reply(body)) as server, chat(server.url, retries=0) as asked:
        assert "no chat completion" in error(asked).message


def test_nobody_there_is_an_error():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with chat(f"http://127.0.0.1:{port}/v1", retries=1) as asked:
        assert "does not answer" in error(asked).message


def test_closing_ends_the_waiting_and_the_asking():
    refused = threading.Event()

    def answer(body):
        refused.set()
        return Reply(b"", 429, {"Retry-After": "50"})

    with endpoint(answer) as server, chat(server.url, concurrency=1) as asked:
        found: list = []
        thread = threading.Thread(target=lambda: found.extend(asked.complete([ASKED] * 3, [1, 2, 3])))
        thread.start()
        refused.wait()
        asked.close()
        thread.join()
        assert [type(answer) for answer in found] == [LanguageUnavailable] * 3
        assert isinstance(one(asked), LanguageUnavailable)


@pytest.mark.parametrize("url", ["localhost:11434", "ftp://host/v1", "http://", "http://host:port/v1", "http:///v1"])
def test_an_address_that_is_none_is_refused(url: str):
    with pytest.raises(ConfigError, match=r"agent\.openai\.url"):
        OpenAIChat(OpenAIConfig(url=url))


def test_a_key_that_no_header_can_carry_is_refused():
    with pytest.raises(ConfigError, match="header"):
        OpenAIChat(OpenAIConfig(api_key="two\nlines"))
