import pytest

from agent.planner import PlannerConfig
from protocol import prompts
from protocol.messages import LoraOptions


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a cat on a couch", "a photo of Abyssinian, which is a cat on a couch"),
        (None, "a photo of Abyssinian"),
        ("", "a photo of Abyssinian"),
    ],
)
def test_the_papers_prompts(caption, expected):
    assert prompts.fill(prompts.PROMPT, prompts.CAPTIONED_PROMPT, "Abyssinian", caption) == expected


def test_braces_of_a_caption_stay():
    assert prompts.fill("", "{class_name}: {caption}", "cup", "{size} of {class_name}") == "cup: {size} of {class_name}"


def test_a_generator_is_adapted_on_the_prompts_that_it_is_asked_with():
    adapted, asked = LoraOptions(), PlannerConfig()
    assert (adapted.prompt, adapted.captioned_prompt) == (asked.prompt, asked.captioned_prompt)
