"""Prompts by a vision-language model behind a real HTTP server that answers well, badly, or not at all."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from agent import language
from agent.expressions.action_units import ACTION_UNITS, named
from agent.expressions.compose import TemplateComposer
from agent.expressions.knowledge import KnowledgeBase
from agent.expressions.settings import ExpressionsConfig
from agent.expressions.vision import VisionComposer
from agent.language import OpenAIChat
from protocol import codec
from protocol.broker import connect
from protocol.bus_captions import CaptionStore
from protocol.entries import Versions
from protocol.errors import BrokerUnavailable, NotReady, UnknownClass
from tests.agent.expressions.asking import asked
from tests.agent.fake_endpoint import Endpoint, Reply, endpoint, said

BASE = KnowledgeBase.open(ExpressionsConfig())
REFUSAL = "I cannot describe people in images."


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "FIRST_PAUSE_S", 0.01)


def question(body: dict) -> str:
    return body["messages"][0]["content"][0]["text"]


def retrieved(body: dict) -> list[str]:
    return re.findall(r"AU\d\d", question(body).rsplit("Cite no", 1)[-1])


def sentence(emotion: str, codes: list[str]) -> str:
    changes = ", ".join(f"{ACTION_UNITS[code].phrase.format('a bit')} ({code})" for code in codes)
    return f"Identity: male-presenting, short dark hair; Expression: {emotion}; {changes}."


def well(body: dict) -> Reply:
    emotion = re.search(r"Target emotion: (.*)\.", question(body))[1]
    return said(sentence(emotion, retrieved(body)[:3]))


@contextmanager
def composing(
    answer: Callable[[dict], Reply], fits=lambda text: True, **settings
) -> Iterator[tuple[VisionComposer, Endpoint, Counter]]:
    counts: Counter[str] = Counter()
    with endpoint(answer) as server:
        config = ExpressionsConfig.model_validate({"openai": {"url": server.url, "retries": 0}} | settings)
        model = OpenAIChat(config.openai, table="agent.expressions.openai")
        compose = VisionComposer(model, BASE, config, fits, lambda what, many: counts.update({what: many}))
        try:
            yield compose, server, counts
        finally:
            compose.close()


def test_what_is_asked_and_what_becomes_of_the_answer():
    with composing(well) as (compose, server, counts):
        (made,) = compose([asked(7, "Surprised")])
    (body,) = server.bodies
    codes = retrieved(body)
    assert codes == list(TemplateComposer(BASE, ExpressionsConfig()).draw(asked(7)).retrieved.units)
    assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0.8, 0.9, 256)
    url = body["messages"][0]["content"][1]["image_url"]["url"]
    assert np.abs(codec.image_from_base64(url).astype(int) - asked(7).image()).max() <= 2
    assert (made.by, made.action_units) == ("qwen2.5vl", codes[:3]) and named(made.prompt) == []
    clauses = ", ".join(ACTION_UNITS[code].phrase.format("a bit") for code in codes[:3])
    assert re.fullmatch(
        rf"There is an expression of \w+ surprise on the face of a man with short dark hair: {clauses}\.", made.prompt
    )
    assert counts == {"answers": 1, "model": 1}


def test_each_clip_has_its_own_frame_and_its_own_candidates():
    with composing(well) as (compose, server, _):
        made = compose([asked(seed) for seed in range(8)])
    assert len({body["messages"][0]["content"][1]["image_url"]["url"] for body in server.bodies}) == 8
    assert len({question(body) for body in server.bodies}) == 8 and len({body["seed"] for body in server.bodies}) == 8
    assert {one.by for one in made} == {"qwen2.5vl"}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (lambda body: REFUSAL, "format"),
        (lambda body: "", "format"),
        (lambda body: sentence("surprise", [*retrieved(body)[:2], "AU15"]), "hallucinated"),
        (lambda body: sentence("fear", retrieved(body)), "emotion"),
        (lambda body: sentence("surprise", retrieved(body)[:1]), "few"),
        (lambda body: re.sub(r"the [^(]*", "the nose wrinkles ", sentence("surprise", retrieved(body))), "misplaced"),
        (lambda body: sentence("surprise", retrieved(body)).replace("short", "very " * 99), "long"),
    ],
)
def test_a_bad_answer_is_asked_for_again(bad: Callable[[dict], str], reason: str):
    count = itertools.count()

    def answer(body: dict) -> Reply:
        return well(body) if next(count) else said(bad(body))

    with composing(answer, lambda text: len(text.split()) < 80) as (compose, server, counts):
        (made,) = compose([asked(5)])
    assert made.by == "qwen2.5vl" and len({body["seed"] for body in server.bodies}) == 2
    assert {what: many for what, many in counts.items() if what != "hallucinating"} == {
        "answers": 2,
        reason: 1,
        "model": 1,
    }


def test_after_some_rounds_the_template_serves():
    with composing(lambda body: said(REFUSAL), rounds=2) as (compose, server, counts):
        clips = [asked(seed) for seed in range(3)]
        assert compose(clips) == TemplateComposer(BASE, ExpressionsConfig())(clips)
    assert len(server.bodies) == 6 and counts == {"answers": 6, "format": 6, "template": 3}


def test_without_an_answer_the_template_serves_at_once(caplog: pytest.LogCaptureFixture):
    with composing(lambda body: Reply(b"away", 503)) as (compose, server, counts):
        made = compose([asked()])
    assert made[0].by == "template" and len(server.bodies) == 1 and counts == {"template": 1}
    assert "template meanwhile" in caplog.text and "agent.expressions.openai.url" in caplog.text


def test_the_rate_of_hallucinations_is_measured():
    """Of 16 answers in the format every fourth names a unit that was not retrieved."""
    count = itertools.count()

    def answer(body: dict) -> Reply:
        number = next(count)
        return (
            said(REFUSAL)
            if number % 5 == 4
            else said(sentence("surprise", ["AU01", *(["AU15"] if number % 5 == 3 else retrieved(body)[1:2])]))
        )

    with composing(answer, rounds=1, candidates=9) as (compose, _, counts):
        compose([asked(seed) for seed in range(20)])
        assert compose.hallucination_rate() == pytest.approx(4 / 16)
        assert compose.tally == counts
    assert counts == {"answers": 20, "format": 4, "hallucinating": 4, "hallucinated": 4, "model": 12, "template": 8}


def test_without_retrieval_nothing_is_told_and_nothing_refused_but_measured():
    def answer(body: dict) -> Reply:
        return said("Identity: man; Expression: surprise; eyes widened (AU06), jaw drop (AU98), brows up (AU01)")

    with composing(answer, retrieval=False) as (compose, server, counts):
        (made,) = compose([asked()])
        assert compose.hallucination_rate() == 1.0
    assert "Cite no" not in question(server.bodies[0])
    assert made.action_units == ["AU01", "AU06"] and named(made.prompt) == []
    assert counts == {"answers": 1, "hallucinating": 1, "model": 1}


def test_an_unknown_class_is_told_before_anything_is_asked():
    with composing(well) as (compose, server, _), pytest.raises(UnknownClass, match="aliases"):
        compose([asked(), asked(1, "boredom")])
    assert not server.bodies


def test_once_closed_units_are_left_to_others():
    with composing(well) as (compose, _, _):
        compose.close()
        with pytest.raises(NotReady):
            compose([asked()])


# ---------------------------------------------------------------- shared by replicas


@pytest.fixture
def store(embedded_url: str) -> Iterator[CaptionStore]:
    with connect(embedded_url) as client:
        yield CaptionStore(client, embedded_url)


def test_another_replica_uses_what_was_used(store: CaptionStore):
    clips = [asked(seed) for seed in range(100, 104)]
    with composing(well) as (compose, _, _):
        first = compose(clips, store)
    with composing(lambda body: said(REFUSAL)) as (compose, server, counts):
        assert compose(clips[::-1], store) == first[::-1]
        assert not server.bodies and counts == {"cache": 4}


def test_what_the_template_made_up_stays_too(store: CaptionStore):
    clips = [asked(seed) for seed in range(200, 203)]
    with composing(lambda body: said(REFUSAL), rounds=1) as (compose, _, _):
        first = compose(clips, store)
    with composing(well) as (compose, server, _):
        assert compose(clips, store) == first and {one.by for one in first} == {"template"}
        assert not server.bodies


def test_two_that_ask_at_once_use_the_same(store: CaptionStore):
    clip = asked(300)
    with composing(well) as (compose, _, _):

        class Late:
            """Another replica is first, between looking and keeping."""

            def get(self, names: list[str]) -> list[None]:
                return [None] * len(names)

            def put(self, name: str, versions: Versions, ttl_s: int) -> Versions:
                codes = ["AU01", "AU02"] if compose.knowledge else []
                store.put(name, Versions(texts=[sentence("surprise", codes)], by=["other"]), ttl_s)
                return store.put(name, versions, ttl_s)

        (made,) = compose([clip], Late())
    assert made.by == "other" and made.action_units == ["AU01", "AU02"]


def test_another_question_about_the_same_sample_is_asked(store: CaptionStore):
    with composing(well) as (compose, server, _):
        compose([asked(400)], store)
        compose([asked(400, "fear")], store)
    assert len(server.bodies) == 2


def test_without_a_store_prompts_are_made_all_the_same(caplog: pytest.LogCaptureFixture):
    class Away:
        def get(self, names: list[str]) -> list[None]:
            raise BrokerUnavailable("away")

        def put(self, name: str, versions: Versions, ttl_s: int) -> Versions:
            raise BrokerUnavailable("away")

    with composing(well) as (compose, _, _):
        first, second = (compose([asked(500)], Away()) for _ in range(2))
    assert first == second and first[0].by == "qwen2.5vl"
    assert caplog.text.count("not shared") == 1
