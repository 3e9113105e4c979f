"""One contract over all that perturbs captions, whatever their model answers, or when it does not."""

from __future__ import annotations

import itertools
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from agent import language
from agent.captions import MAX_WORDS, Perturber, Subject
from agent.settings import AgentConfig
from generator_service.perturbation import perturber
from tests.agent.fake_endpoint import Reply, endpoint, said
from tests.generator_service.language.tiny_language import save_chat

SUBJECTS = [
    Subject("american bulldog", "a dog walking through a field of purple flowers"),
    Subject("abyssinian", None),
    Subject("tench, Tinca tinca", "a man holding a fish, and smiling, in a boat on a lake at dusk"),
    Subject("dog", "狗在草地上"),
]


def versions(body: dict) -> Reply:
    wanted = int(body["messages"][0]["content"].split()[-2])
    return said("\n".join(f"{n}. scene {body['seed'] % 997} number {n}" for n in range(1, wanted + 1)))


def in_turn(*replies: Reply) -> Callable[[dict], Reply]:
    turns = itertools.cycle(replies)
    return lambda body: next(turns)


ANSWERS: dict[str, Callable[[dict], Reply]] = {
    "good": versions,
    "one line": lambda body: said("a dog asleep"),
    "empty": lambda body: said(""),
    "refusal": lambda body: said("I'm sorry, but as an AI I cannot do that."),
    "no content": lambda body: said(None),
    "the same": lambda body: said("\n".join(["1. a dog asleep"] * 50)),
    "too long": lambda body: said("\n".join(f"{n}. {'very ' * 12} {n} dog" for n in range(50))),
    "binary": lambda body: said("\x00\x1b[31m\u202e\ufffd" * 50),
    "html": lambda body: Reply(b"<html>502 Bad Gateway</html>"),
    "429": lambda body: Reply(b"slow down", 429, {"Retry-After": "900"}),
    "500": lambda body: Reply(b"oops", 500),
    "401": lambda body: Reply(b"who are you", 401),
    "now and then": in_turn(said("1. a dog asleep\n2. a dog awake"), Reply(b"", 500), said("none"), Reply(b"", 503)),
}
KINDS = ["template", "local", "refused", "silent", *ANSWERS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat(tmp_path_factory.mktemp("chat"))


@pytest.fixture(params=KINDS)
def perturb(request: pytest.FixtureRequest, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Perturber]:
    monkeypatch.setattr(language, "FIRST_PAUSE_S", 0.01)
    local = {"model": str(folder), "device": "cpu", "max_new_tokens": 20, "temperature": 1.0}
    kind = request.param if request.param in ("template", "local") else "openai"
    with ExitStack() as around:
        port = around.enter_context(socket.create_server(("127.0.0.1", 0)))
        url = f"http://127.0.0.1:{port.getsockname()[1]}/v1"
        if request.param == "refused":
            port.close()
        if request.param in ANSWERS:
            url = around.enter_context(endpoint(ANSWERS[request.param])).url
        timeout_s = 0.05 if request.param == "silent" else 30.0
        asked = {"url": url, "model": "llama", "retries": 1, "timeout_s": timeout_s}
        made = perturber(AgentConfig.model_validate({"perturb": kind, "openai": asked, "local": local}), COUNTS.count)
        yield made
        made.close()


class Counts(Counter[str]):
    def count(self, what: str, how_many: int) -> None:
        self[what] += how_many


COUNTS = Counts()


@pytest.mark.parametrize("m", [1, 5, 40])
def test_there_are_always_m_distinct_prompts_of_the_class(perturb: Perturber, m: int, caplog: pytest.LogCaptureFixture):
    COUNTS.clear()
    found = perturb(SUBJECTS, m)
    assert found.keys() == set(SUBJECTS)
    for subject, made in found.items():
        prompts = {perturb.fill_in(subject, version) for version in made.texts}
        assert len(prompts) == len(made.texts) == len(made.by) == m
        assert all(prompt.startswith(f"a photo of {subject.class_name}, which is ") for prompt in prompts)
        assert max(len(version.split()) for version in made.texts) <= MAX_WORDS
        assert subject.caption not in made.texts
    by_template = sum(made.by.count("template") for made in found.values())
    assert COUNTS["template"] == by_template and COUNTS["model"] == m * len(SUBJECTS) - by_template
    assert len(caplog.messages) <= 1  # what is wrong is said once
    assert perturb(SUBJECTS, m) == found


def test_a_good_model_needs_no_template(folder: Path):
    with endpoint(versions) as server:
        agent = AgentConfig.model_validate({"perturb": "openai", "openai": {"url": server.url, "model": "llama"}})
        perturb = perturber(agent, lambda what, how_many: None)
        assert all(made.by == ["llama"] * 7 for made in perturb(SUBJECTS, 7).values())
        perturb.close()
