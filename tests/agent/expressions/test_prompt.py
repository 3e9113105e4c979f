from __future__ import annotations

import numpy as np
import pytest

from agent.expressions import prompt
from agent.expressions.retrieve import Described, Retrieved

TOLD = Described({"AU01": 0.3, "AU26": 0.5}, "the inner brows rise a little and the jaw drops visibly")


def draw() -> np.random.Generator:
    return np.random.default_rng(0)


def test_the_question_is_the_papers_and_names_what_was_retrieved():
    asked = prompt.question("fear", Retrieved([TOLD, Described({"AU05": 0.2}, "the eyes widen barely")]))
    assert asked.startswith("From a neutral face image, produce one sentence that preserves identity")
    assert '"Identity: [identity cues]; Expression: [target emotion]; [specific changes (AU codes)]"' in asked
    assert "Target emotion: fear." in asked
    assert f"1. {TOLD.text}\n2. the eyes widen barely\n" in asked
    assert asked.endswith("AU01 (inner brow raiser); AU05 (upper lid raiser); AU26 (jaw drop).")


def test_without_retrieval_nothing_is_named():
    assert prompt.question("fear", None) == f"{prompt.INSTRUCTION}\nTarget emotion: fear."


def test_templated_prompts_say_less_and_less():
    forms = list(prompt.templated("fear", TOLD, "A woman (AU12) in red.", draw()))
    assert "a woman in red" in forms[0].lower() and "a person" in forms[1].lower()
    assert all(TOLD.text in form for form in forms[:2]) and all("fear" in form for form in forms)
    assert forms[2].count("the jaw drops ") == forms[2].count("the inner brows rise ") == 1
    assert "the jaw drops " in forms[3] and "brows" not in forms[3]  # the faintest went first
    assert forms[4].startswith("a person with an expression of ") and len(forms) == 5


@pytest.mark.parametrize(
    ("caption", "who"),
    [
        ("A man, short black hair.", "a man with short black hair"),
        ("male appearance, holding a phone", "a man holding a phone"),
        ("Looking at the camera", "a person looking at the camera"),
    ],
)
def test_a_caption_of_cues_becomes_a_person(caption: str, who: str):
    assert who[2:] in next(prompt.templated("fear", TOLD, caption, draw()))


def test_every_wording_is_a_sentence_with_all_three_parts():
    for wording in prompt._WORDINGS:
        text = prompt._worded(wording, "an expression of mild fear", "a man", "the eyes widen.")
        assert text[0].isupper() and text.endswith("the eyes widen.") and "a man" in text.lower()
        assert "n expression of mild fear" in text and "{" not in text


@pytest.mark.parametrize(
    ("identity", "who"),
    [
        ("female, short dark hair", "a woman with short dark hair"),
        ("male-presenting, short black hair, wearing glasses", "a man with short black hair, wearing glasses"),
        ("male appearance, holding a phone", "a man holding a phone"),
        ("fair-skinned woman, light brown hair", "a fair-skinned woman with light brown hair"),
        ("an elderly man; AU04", "an elderly man"),
        ("bald head, asian facial features", "a person with bald head, asian facial features"),
        ("a young woman with long hair", "a young woman with long hair"),
        ("boy in a red shirt, smiling eyes", "a boy in a red shirt, smiling eyes"),
        ("adult male with a beard", "an adult male with a beard"),
        ("The actress, on a balcony", "the actress, on a balcony"),
        ("person", "a person"),
        ("(AU01)", "a person"),
    ],
)
def test_a_models_cues_become_a_person(identity: str, who: str):
    text = prompt.answered(identity, "surprise", "brows raise sharply (AU01), mouth opens (AU26).", {}, draw())
    assert text == f"There is an expression of slight surprise on the face of {who}: brows raise sharply, mouth opens."


def test_how_strong_it_is_follows_from_the_units_that_were_named():
    text = prompt.answered("man", "fear", "brows rise", {"AU01": 0.9, "AU05": 1.0}, draw())
    assert text.startswith(("There is an expression of intense fear", "There is an expression of sharp fear"))


def test_neutral_is_no_emotion_that_one_shows():
    assert prompt.expression("neutral", "slight") == "a neutral expression"
