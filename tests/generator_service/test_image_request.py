from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from generator_service.backends.interface import Abilities, WeightSet
from generator_service.image_request import ImageDefaults, ImageOrder, order
from generator_service.real_images import resized
from protocol.codec import image_to_base64
from protocol.errors import InvalidImage, InvalidRequest, OnTheFlyError, UnknownClass, UnsupportedField
from protocol.messages import ImageGenerationRequest, WeightsRef

DEFAULTS = ImageDefaults(steps=7, scheduler="dpm-solver", guidance_scale=3.0, strength=0.6, max_pixels=100)
NUMBERS = tuple(str(number) for number in range(25))


@dataclass
class Able:
    """What is asked of a backend here: it makes 16 x 8 images, and reads 5 words."""

    can: Abilities

    def native_size(self) -> tuple[int, int]:
        return 8, 16

    def prompt_length(self, prompt: str) -> tuple[int, int] | None:
        return None if self.can.conditioning == "class" else (len(prompt.split()), 5)


def asked(
    classes: tuple[str, ...] = NUMBERS, conditioning: str = "class", visual: str | None = None, **fields
) -> ImageOrder:
    """`visual`: of a LoRA; None: these weights are none."""
    ref = WeightsRef(name="base", version=1, digest="d")
    kind, metadata = ("full", {}) if visual is None else ("lora", {"visual": visual})
    weights = WeightSet(ref, "dit", kind, None, classes, Path("."), metadata=metadata)
    request = ImageGenerationRequest(**({"prompt": "7"} | fields))
    can = Abilities(conditioning, ("ddim", "dpm-solver"), ("cold_start",))
    return order(request, weights, Able(can), DEFAULTS)


def test_defaults_fill_what_is_left_out():
    made = asked(seed=40, n=3)
    assert [row.seed for row in made.rows] == [40, 41, 42]
    assert {(row.label, row.guidance_scale, row.image is None) for row in made.rows} == {(7, 3.0, True)}
    sampling = made.sampling
    assert (sampling.steps, sampling.scheduler, sampling.strength, sampling.guided) == (7, "dpm-solver", 1.0, True)
    assert made.class_name == "7"


def test_seeds_are_drawn_anew_and_exact_in_json():
    drawn = {asked().rows[0].seed for _ in range(20)}
    assert len(drawn) == 20 and max(drawn) < 2**53


@pytest.mark.parametrize(("guidance", "guided"), [(0.0, False), (1.0, False), (1.01, True)])
def test_guidance_up_to_one_is_off(guidance: float, guided: bool):
    assert asked(guidance_scale=guidance).sampling.guided is guided


def test_an_init_image_is_decoded_and_gets_a_strength():
    image = np.arange(75, dtype=np.uint8).reshape(5, 5, 3)
    made = asked(image=image_to_base64(image))
    np.testing.assert_array_equal(made.rows[0].image, resized(image, (8, 16)))
    assert made.request.image is None  # which may be large, and is not needed any more
    assert made.sampling.strength == 0.6
    assert asked(image=image_to_base64(image), strength=0.25).sampling.strength == 0.25


# ---------------------------------------------------------------- classes


@pytest.mark.parametrize(
    ("prompt", "classes", "label"),
    [
        ("7", NUMBERS, 7),
        (" 7 ", NUMBERS, 7),
        ("a photo of 7, smiling", NUMBERS, 7),
        ("17", NUMBERS, 17),  # not 1 nor 7
        ("a polar bear", ("bear", "polar bear"), 1),
        ("Sea Lion on ice", ("sea lion", "lion"), 0),
        ("a photo of B", ("A", "B"), 1),
        ("C++ code", ("C", "C++"), 1),
        ("the 7 and again 7", NUMBERS, 7),
    ],
)
def test_a_prompt_names_its_class_as_a_whole_word(prompt: str, classes: tuple[str, ...], label: int):
    assert asked(classes, prompt=prompt).label == label


@pytest.mark.parametrize("prompt", ["a cat", "77", "7 or 8", "x7"])
def test_a_prompt_without_exactly_one_class_lists_the_first_twenty(prompt: str):
    with pytest.raises(UnknownClass) as error:
        asked(prompt=prompt)
    assert error.value.param == "prompt"
    if "or" not in prompt:
        assert "0, 1, 2" in error.value.message and ", 19 ... (25 in all)" in error.value.message


def test_class_label_is_an_index_or_a_name_and_goes_before_the_prompt():
    assert asked(class_label=3).label == 3
    assert asked(("cat", "dog"), class_label="dog", prompt="cat").label == 1


@pytest.mark.parametrize("label", [25, -1, "cat", 10**30])
def test_an_unknown_class_label_is_refused(label: int | str):
    with pytest.raises(UnknownClass) as error:
        asked(class_label=label)
    assert error.value.param == "class_label"


def test_text_conditioned_weights_take_any_prompt_and_a_negative_one_but_no_label():
    made = asked((), "text", prompt="a cat", negative_prompt="blurry")
    assert (made.label, made.class_name, made.rows[0].prompt) == (None, None, "a cat")
    assert made.rows[0].negative_prompt == "blurry"
    with pytest.raises(UnsupportedField):
        asked((), "text", class_label=1)


def test_text_conditioned_weights_that_know_classes_take_a_label_beside_the_prompt():
    assert asked(("cat", "dog"), "text", prompt="on a sofa, a dog").label is None
    made = asked(("cat", "dog"), "text", prompt="on a sofa", class_label="dog")
    assert (made.label, made.class_name, made.rows[0].prompt) == (1, "dog", "on a sofa")


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize("name", ["prompt", "negative_prompt"])
def test_prompts_that_are_not_read_to_their_end_are_refused(name: str):
    assert asked((), "text", **{name: "one two three four five"}).rows
    with pytest.raises(InvalidRequest, match="6 tokens, and the text encoder reads 5") as error:
        asked((), "text", **{name: "one two three four five six"})
    assert error.value.param == name
    assert asked(prompt="one two three four five six 7").label == 7  # where the prompt only names a class


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_a_negative_prompt_without_guidance_is_refused(guidance: float):
    assert asked((), "text", negative_prompt="blurry", guidance_scale=1.01).rows
    with pytest.raises(UnsupportedField, match="no effect") as error:
        asked((), "text", negative_prompt="blurry", guidance_scale=guidance)
    assert error.value.param == "negative_prompt"


def test_a_class_label_that_has_no_visual_token_is_refused():
    assert asked(("cat", "dog"), "text", "class", class_label="dog").label == 1
    assert asked(("cat", "dog"), "text", "none").label is None
    with pytest.raises(UnsupportedField, match="visual tokens") as error:
        asked(("cat", "dog"), "text", "none", class_label="dog")
    assert error.value.param == "class_label"


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"style": "vivid"}, UnsupportedField),
        ({"quality": "hd"}, UnsupportedField),
        ({"background": "transparent"}, UnsupportedField),
        ({"moderation": "low"}, UnsupportedField),
        ({"stream": True}, UnsupportedField),
        ({"partial_images": 1}, UnsupportedField),
        ({"output_compression": 50}, UnsupportedField),
        ({"negative_prompt": "blurry"}, UnsupportedField),
        ({"size": "1024x1024"}, UnsupportedField),
        ({"scheduler": "euler"}, UnsupportedField),
        ({"lora_scale": 0.5}, UnsupportedField),
        ({"size": "big"}, InvalidRequest),
        ({"strength": 0.5}, InvalidRequest),
        ({"image": "bm90IGFuIGltYWdl"}, InvalidImage),
        ({"image": "***"}, InvalidImage),
        ({"image": image_to_base64(np.zeros((11, 10, 3), np.uint8))}, InvalidImage),
        ({"seed": 2**63 - 1, "n": 2}, InvalidRequest),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_honoured_is_refused_by_name(fields: dict, kind: type[OnTheFlyError]):
    with pytest.raises(kind) as error:
        asked(**fields)
    assert type(error.value) is kind
    named = error.value.param
    assert named in fields or kind is InvalidImage


@pytest.mark.parametrize(
    "fields",
    [
        {"quality": "auto", "background": "opaque", "moderation": "auto", "stream": False, "partial_images": 0},
        {"size": "auto"},
        {"size": "16x8"},
        {"output_format": "jpeg", "output_compression": 50},
    ],
    ids=str,
)
def test_what_is_honoured_passes(fields: dict):
    assert asked(**fields).label == 7
