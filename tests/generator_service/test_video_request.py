from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from generator_service.backends.interface import Abilities, WeightSet
from generator_service.image_request import ImageDefaults, order
from generator_service.real_images import resized
from generator_service.video_request import VideoDefaults, VideoOrder, order_video
from protocol.codec import image_to_base64
from protocol.errors import InvalidImage, InvalidRequest, OnTheFlyError, UnsupportedField
from protocol.messages import ImageGenerationRequest, WeightsRef
from protocol.video import GuidanceCurve, VideoGenerationRequest

DEFAULTS = VideoDefaults(
    frames=12, fps=6.0, steps=7, scheduler="euler", resampling=2, guidance_scale=5.0, max_pixels=100
)
PICTURE = np.arange(75, dtype=np.uint8).reshape(5, 5, 3)
CURVE = {"minimum": 2.0, "maximum": 8.0, "a": 3.0, "b": 2.0}


@dataclass
class Able:
    """What is asked of a backend here: it makes 16 x 8 clips, and reads 5 words."""

    makes: str = "clip"

    @property
    def can(self) -> Abilities:
        return Abilities("text", ("ddim", "euler"), (), makes=self.makes)

    def native_size(self) -> tuple[int, int]:
        return 8, 16

    def prompt_length(self, prompt: str) -> tuple[int, int]:
        return len(prompt.split()), 5


def weights(kind: str = "full") -> WeightSet:
    return WeightSet(WeightsRef(name="base", version=1, digest="d"), "ti2v", kind, None, (), Path("."))


def asked(kind: str = "full", makes: str = "clip", **fields) -> VideoOrder:
    """An order for weights of this kind."""
    request = VideoGenerationRequest(**({"prompt": "a smile", "image": image_to_base64(PICTURE)} | fields))
    return order_video(request, weights(kind), Able(makes), DEFAULTS, "http://here")


def test_defaults_fill_what_is_left_out():
    made = asked(seed=40, n=3)
    assert [row.seed for row in made.rows] == [40, 41, 42]
    assert {(row.label, row.prompt, row.guidance_scale, row.guidance, row.steps) for row in made.rows} == {
        (None, "a smile", 5.0, None, None)
    }
    sampling = made.sampling
    assert (sampling.steps, sampling.scheduler, sampling.frames, sampling.resampling) == (7, "euler", 12, 2)
    assert (sampling.guided, sampling.policy, made.fps, made.base_url) == (True, False, 6.0, "http://here")


def test_what_a_request_says_counts():
    made = asked(
        num_frames=4,
        fps=12.0,
        num_inference_steps=3,
        scheduler="ddim",
        resampling=0,
        guidance=GuidanceCurve(**CURVE),
        negative_prompt="blurry",
    )
    sampling, row = made.sampling, made.rows[0]
    assert (sampling.steps, sampling.scheduler, sampling.frames, sampling.resampling) == (3, "ddim", 4, 0)
    assert (row.guidance, row.negative_prompt, made.fps) == (GuidanceCurve(**CURVE), "blurry", 12.0)


def test_the_first_frame_gets_the_backends_size_and_its_text_is_not_kept():
    made = asked()
    np.testing.assert_array_equal(made.rows[0].image, resized(PICTURE, (8, 16)))
    assert made.request.image == ""


@pytest.mark.parametrize(
    ("kind", "fields", "policy"),
    [
        ("policy", {}, True),
        ("policy", {"num_frames": 4, "fps": 2.0, "resampling": 1, "negative_prompt": "blurry"}, True),
        ("policy", {"num_inference_steps": 3}, False),
        ("policy", {"guidance_scale": 3.0}, False),
        ("policy", {"guidance": GuidanceCurve(**CURVE)}, False),
        ("full", {}, False),
        ("lora", {}, False),
    ],
    ids=str,
)
def test_the_policy_chooses_where_the_weights_have_one_and_the_request_leaves_it_open(kind, fields, policy):
    sampling = asked(kind, **fields).sampling
    assert (sampling.policy, sampling.guided) == (policy, True)
    assert sampling.steps == fields.get("num_inference_steps", 7)  # what is not said comes from the settings


@pytest.mark.parametrize(
    ("fields", "guided"),
    [
        ({"guidance_scale": 1.0}, False),
        ({"guidance_scale": 1.1}, True),
        ({"guidance": GuidanceCurve(minimum=0.0, maximum=1.0)}, False),
        ({"guidance": GuidanceCurve(minimum=0.0, maximum=2.0)}, True),
    ],
    ids=str,
)
def test_guidance_up_to_one_is_off(fields: dict, guided: bool):
    assert asked(**fields).sampling.guided is guided
    if not guided:
        with pytest.raises(UnsupportedField, match="no effect"):
            asked(negative_prompt="blurry", **fields)


@pytest.mark.parametrize(
    ("fields", "kind", "param"),
    [
        ({"size": "512x512"}, UnsupportedField, "size"),
        ({"size": "wide"}, InvalidRequest, "size"),
        ({"scheduler": "unipc"}, UnsupportedField, "scheduler"),
        ({"prompt": "one two three four five six"}, InvalidRequest, "prompt"),
        ({"negative_prompt": "one two three four five six"}, InvalidRequest, "negative_prompt"),
        ({"image": "AAAA"}, InvalidImage, "image"),
        ({"image": "not base64"}, InvalidImage, "image"),
        ({"image": "http://example.com/x.png"}, InvalidImage, "image"),
        ({"image": image_to_base64(np.zeros((11, 10, 3), np.uint8))}, InvalidImage, "image"),
        ({"seed": 2**63 - 1, "n": 2}, InvalidRequest, "seed"),
        ({"makes": "image"}, InvalidRequest, "model"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_honoured_is_refused_by_name(fields: dict, kind: type[OnTheFlyError], param: str):
    for weights_kind in ("full", "policy"):
        with pytest.raises(kind) as error:
            asked(weights_kind, **fields)
        assert (type(error.value), error.value.param) == (kind, param)


def test_an_own_size_passes():
    assert asked(size="16x8").sampling == asked(size="auto").sampling == asked().sampling


def test_weights_of_the_other_kind_say_what_to_send():
    with pytest.raises(InvalidRequest, match='make images only: send a job of type "generate"'):
        asked(makes="image")
    with pytest.raises(InvalidRequest, match='make clips: send a job of type "video"') as error:
        order(ImageGenerationRequest(prompt="x"), weights(), Able(), ImageDefaults())
    assert error.value.param == "model"
