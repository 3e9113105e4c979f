"""Answers of vision-language models: which are taken apart, which are refused, and why."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.expressions.action_units import named, untagged
from agent.expressions.check import Answer, Refused, check, hallucinated, misplaced, parse

RETRIEVED = ("AU01", "AU02", "AU05", "AU26")
# The paper's Figure 4: without and with the knowledge base.
UNAIDED = (
    "Identity: male-presenting, short dark hair, wearing glasses; \nExpression: fear; inner brows raised (AU01), eyes "
    "widened (AU06), mouth open (AU10), jaw drop (AU98)."
)
AIDED = (
    "Identity: male-presenting, short black hair, wearing glasses; Expression: fear; inner brows raise sharply (AU01), "
    "upper eyelids tighten (AU06), mouth stretches downward (AU15), jaw slightly clenches."
)
GOOD = (
    "Identity: a woman; Expression: surprise; the inner brows rise (AU01), the eyes widen (AU05), the jaw drops (AU26)"
)
WRITTEN = [  # answers to "surprise" with RETRIEVED, and what is to become of them
    (GOOD, None),
    (f"“{GOOD}”", None),
    (f"**{GOOD}.**", None),
    (GOOD.replace("; ", ";\n"), None),
    (GOOD.replace("; ", "\n"), None),
    (GOOD.replace("surprise", "Surprised"), None),
    (GOOD.replace("surprise", "[surprise]"), None),
    (GOOD.replace("(AU01)", "(AU1)").replace("(AU05)", "AU 5"), None),
    (f"<think>AU99? no</think>\n{GOOD}", None),
    ("Identity: bald man; Expression: surprise; both brows shoot up (AU01, AU02), jaw drops slightly (AU26)", None),
    ("Identity: girl; Expression: surprise; brows rise (AU01+AU02); mouth opens a little", None),
    ("Identity: girl; Expression: surprise; AU01 and AU02 raised", None),
    (GOOD.replace("AU26", "AU27"), "hallucinated"),
    (GOOD.replace("(AU26)", "(AU26, AU98)"), "hallucinated"),
    (GOOD.replace("a woman", "a woman (AU12)"), "hallucinated"),
    (UNAIDED.replace("fear", "surprise"), "hallucinated"),
    (GOOD.replace("surprise", "fear"), "emotion"),
    (GOOD.replace("surprise", "surprise and fear"), "emotion"),
    (GOOD.replace("surprise", "slight surprise"), None),
    (GOOD.replace("surprise", "slight fear"), "emotion"),
    ("Identity: man; Expression: surprise; the eyes widen (AU05)", "few"),
    ("Identity: man; Expression: surprise; the eyes widen and the jaw drops", "few"),
    ("Identity: man; Expression: surprise; the jaw drops (AU05), the inner brows rise (AU01)", "misplaced"),
    ("Identity: man; Expression: surprise; lips part (AU01), eyes widen (AU05)", "misplaced"),
    ("", "format"),
    ("I cannot describe people in images.", "format"),
    ("Sure! Here it is:\n" + GOOD, "format"),
    (GOOD + "\nDescription: a surprised woman", "format"),
    (GOOD + "\n" + GOOD, "format"),
    ("Expression: surprise; the eyes widen (AU05), jaw drops (AU26)", "format"),
    ("Identity: man; Expression: surprise", "format"),
    ("Identity: man; Expression: surprise; (AU01, AU02)", "format"),
    ("Identity: ; Expression: surprise; brows rise (AU01, AU02)", "format"),
    (GOOD + " again" * 1000, "format"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "reason"), WRITTEN)
def test_what_becomes_of_an_answer(text: str, reason: str | None):
    found = check(text, "surprise", RETRIEVED)
    assert (found.reason if isinstance(found, Refused) else None) == reason, found


def test_an_answer_is_taken_apart():
    assert check(AIDED, "fear", ("AU01", "AU06", "AU15")) == Answer(
        "male-presenting, short black hair, wearing glasses",
        "fear",
        "inner brows raise sharply (AU01), upper eyelids tighten (AU06), mouth stretches downward (AU15), jaw slightly "
        "clenches",
        ("AU01", "AU06", "AU15"),
    )


def test_the_papers_unaided_answer_is_caught_for_what_is_wrong_in_it():
    answer = parse(UNAIDED)
    assert hallucinated(answer, ("AU01", "AU06", "AU10")) == ["AU98"]
    assert misplaced(parse(UNAIDED.replace("(AU06)", "(AU15)"))) == ["AU15"]
    assert misplaced(parse(AIDED)) == []


def test_without_retrieval_any_action_unit_may_be_named():
    assert isinstance(check(UNAIDED, "fear", None), Answer)
    assert check("Identity: man; Expression: fear; eyes wide (AU05)", "fear", None) == Refused("few")


def test_where_one_unit_was_retrieved_one_is_enough():
    text = "Identity: man; Expression: calm; the eyes blink (AU45)"
    assert isinstance(check(text, "neutral", ["AU45"]), Answer)


def test_own_names_of_emotions_are_understood():
    assert isinstance(
        check(GOOD.replace("surprise", "Staunen"), "surprise", RETRIEVED, {"staunen": "surprise"}), Answer
    )


def test_the_rate_of_refusals_on_what_is_written_here():
    found = Counter(
        found.reason if isinstance(found := check(text, "surprise", RETRIEVED), Refused) else "good"
        for text, _ in WRITTEN
    )
    assert found == {"good": 13, "format": 10, "hallucinated": 4, "emotion": 3, "few": 2, "misplaced": 2}
    formed = [answer for text, _ in WRITTEN if (answer := parse(text))]
    assert sum(bool(hallucinated(answer, RETRIEVED)) for answer in formed) / len(formed) == pytest.approx(4 / 24)


@given(st.text() | st.text(alphabet="AU0123()[];:,\n Identity Expression surprise"))
def test_any_text_is_an_answer_or_refused(text: str):
    found = check("Identity: a man; Expression: surprise; " + text, "surprise", RETRIEVED)
    if isinstance(found, Answer):
        assert set(found.units) <= set(RETRIEVED) and named(untagged(found.changes)) == []
    check(text, "surprise", RETRIEVED)
