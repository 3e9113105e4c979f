from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agent.expressions.action_units import named
from agent.expressions.compose import TemplateComposer
from agent.expressions.emotions import ALIASES
from agent.expressions.knowledge import KnowledgeBase
from agent.expressions.settings import ExpressionsConfig
from tests.agent.expressions.asking import asked

CONFIG = ExpressionsConfig()
BASE = KnowledgeBase.open(CONFIG)
CLASSES = st.sampled_from([name for emotion, names in ALIASES.items() for name in (emotion, *names)])


def composer(fits=lambda text: True, **config) -> TemplateComposer:
    return TemplateComposer(BASE, ExpressionsConfig(**config), fits)


@given(CLASSES, st.integers(0, 2**63 - 1), st.none() | st.text(max_size=40) | st.just("a man (AU12), AU 4"))
def test_a_prompt_names_its_emotion_and_no_codes_and_is_of_what_was_retrieved(
    name: str, seed: int, caption: str | None
):
    compose, clip = composer(), asked(seed, name, caption)
    (made,) = compose([clip])
    assert made.by == "template" and named(made.prompt) == []
    drawn = compose.draw(clip)
    assert drawn.emotion in made.prompt
    told = drawn.retrieved.candidates[0]
    assert made.action_units == list(told.units) and told.text in made.prompt
    assert [tuple(entry.units) for entry in BASE.of(name)].count(tuple(made.action_units)) == 1
    assert compose([asked(seed + 1), clip])[1] == made  # whatever else is composed with it


def test_prompts_are_many():
    made = composer()([asked(seed) for seed in range(500)])
    assert len({one.prompt for one in made}) > 450
    assert len({tuple(one.action_units) for one in made}) == len(BASE.of("surprise"))


def test_a_caption_says_who_it_is():
    (made,) = composer()([asked(3, caption="A bearded man in a blue shirt.")])
    assert "a bearded man in a blue shirt" in made.prompt.lower() and "a person" not in made.prompt


def test_what_the_encoder_would_cut_is_left_out_beforehand():
    words = 20
    compose = composer(lambda text: len(text.split()) <= words)
    for one in compose([asked(seed, caption="a man " * 20) for seed in range(50)]):
        assert len(one.prompt.split()) <= words and "surprise" in one.prompt
    (shortest,) = composer(lambda text: False)([asked()])
    assert shortest.prompt.startswith("a person with an expression of ")


def test_intensity_is_as_set():
    faint = composer(intensity=(0.01, 0.05))([asked(seed) for seed in range(50)])
    full = composer(intensity=(1.0, 1.0))([asked(seed) for seed in range(50)])
    assert all("faint surprise" in one.prompt for one in faint)
    assert not any("faint" in one.prompt or "slight" in one.prompt for one in full)
