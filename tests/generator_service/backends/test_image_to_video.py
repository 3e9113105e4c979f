from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXImageToVideoPipeline,
    LTXVideoTransformer3DModel,
)
from PIL import Image
from transformers import T5EncoderModel, T5TokenizerFast

from generator_service.backends.image_to_video import Config, ImageToVideoBackend
from generator_service.backends.interface import Row, Sampling, WeightSet
from protocol.errors import Cancelled, ConfigError, InvalidRequest, UnsupportedField, WeightsCorrupt
from protocol.messages import WeightsRef
from protocol.video import GuidanceCurve
from tests.generator_service import tiny_t2v
from tests.generator_service.tiny_ltx import save_checkpoint


def open_backend(folder, **settings) -> ImageToVideoBackend:
    return ImageToVideoBackend(Config(checkpoint=str(folder), device="cpu", **{"height": 32, "width": 64} | settings))


def full(backend, folder=None, name="base") -> WeightSet:
    ref = WeightsRef(name=name, version=1, digest=name)
    return WeightSet(ref, backend.name, "full", None, (), folder or backend.folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("ltx"))


@pytest.fixture(scope="module")
def backend(folder):
    return open_backend(folder)


@pytest.fixture(scope="module")
def base(backend):
    return full(backend)


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (32, 64, 3), dtype=np.uint8)


ROWS = [
    Row(1, None, 3.0, "an owl", "blurry", picture(1)),
    Row(2, None, 3.0, "a cat", None, picture(2)),
    Row(3, None, 5.0, "dogs, 3 of them", None, picture(3), steps=3),
]


def sampling(frames: int = 6, steps: int = 2, **more) -> Sampling:
    return Sampling(steps, "euler", guided=True, frames=frames, **more)


@pytest.mark.parametrize("denoising_decoder", [False, True])
def test_as_the_stock_pipeline_makes_it(tmp_path, denoising_decoder):
    """6 frames are the first of 9, since they come four at a time; the first is ours as it was given."""
    folder = save_checkpoint(tmp_path, denoising_decoder=denoising_decoder)
    backend = open_backend(folder)
    stock = LTXImageToVideoPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        vae=AutoencoderKLLTXVideo.from_pretrained(folder / "vae"),
        text_encoder=T5EncoderModel.from_pretrained(folder / "text_encoder"),
        tokenizer=T5TokenizerFast.from_pretrained(folder / "tokenizer"),
        transformer=LTXVideoTransformer3DModel.from_pretrained(folder / "transformer"),
    )
    stock.set_progress_bar_config(disable=True)
    got = backend.generate(full(backend), ROWS, sampling())
    for row, clip in zip(ROWS, got, strict=True):
        expected = stock(
            image=Image.fromarray(row.image),
            prompt=row.prompt,
            negative_prompt=row.negative_prompt or "",
            height=32,
            width=64,
            num_frames=9,
            num_inference_steps=row.steps or 2,
            guidance_scale=row.guidance_scale,
            generator=torch.Generator().manual_seed(row.seed),
            decode_timestep=0.05,
            decode_noise_scale=0.025,
            output_type="np",
        ).frames[0]
        assert np.abs(clip[1:] - expected[1:6] * 255).max() < 1.6
        np.testing.assert_array_equal(clip[0], row.image)


class TestRowsAndTheirMates:
    def test_a_row_does_not_depend_on_its_batch_mates(self, backend, base):
        together = backend.generate(base, ROWS, sampling()).astype(int)
        for row, clip in zip(ROWS, together, strict=True):
            assert np.abs(clip - backend.generate(base, [row], sampling())[0]).max() <= 1

    def test_equal_to_the_bit_at_equal_shape(self, backend, base):
        first = backend.generate(base, ROWS[:2], sampling())
        backend.generate(base, ROWS[:1], sampling())
        np.testing.assert_array_equal(first, backend.generate(base, ROWS[:2], sampling()))

    def test_every_setting_of_a_row_counts(self, backend, base):
        row = ROWS[0]
        others = [
            replace(row, seed=9),
            replace(row, guidance_scale=9.0),
            replace(row, prompt="cats and dogs"),
            replace(row, negative_prompt="a dog on a mat"),
            replace(row, image=picture(8)),
            replace(row, steps=4),
        ]
        made = backend.generate(base, [row, *others], sampling()).astype(int)
        assert (np.abs(made[1:] - made[0]).max(axis=(1, 2, 3, 4)) > 0).all()

    @pytest.mark.parametrize("scale", [0.0, 1.0])
    def test_guidance_up_to_one_is_off(self, backend, base, scale):
        off = backend.generate(base, [replace(ROWS[0], guidance_scale=scale)], sampling())
        np.testing.assert_array_equal(off, backend.generate(base, ROWS[:1], replace(sampling(), guided=False)))


class TestSteps:
    def test_are_told_one_by_one_over_all_groups(self, backend, base):
        told = []
        backend.generate(base, ROWS, sampling(2), lambda *step: told.append(step))
        assert told == [(done, 5) for done in range(1, 6)]

    def test_may_end_it(self, backend, base):
        told = []

        def cancel(done, total):
            told.append(done)
            if done == 2:
                raise Cancelled("enough")

        with pytest.raises(Cancelled):
            backend.generate(base, ROWS[:1], sampling(2, 5), cancel)
        assert told == [1, 2]
        assert backend.generate(base, ROWS[:1], sampling(2, 2)).shape == (1, 2, 32, 64, 3)


class TestBadInput:
    @pytest.mark.parametrize(
        ("row", "asked", "param"),
        [
            (replace(ROWS[0], guidance=GuidanceCurve()), sampling(), "guidance"),
            (ROWS[0], sampling(resampling=1), "resampling"),
            (ROWS[0], replace(sampling(), scheduler="ddim"), "scheduler"),
        ],
        ids=["a curve", "resampling", "another sampler"],
    )
    def test_what_the_pipeline_does_not_have(self, backend, base, row, asked, param):
        with pytest.raises(UnsupportedField) as refused:
            backend.generate(base, [row], asked)
        assert refused.value.param == param

    def test_no_image_and_no_frames(self, backend, base):
        with pytest.raises(InvalidRequest, match="begins with an image"):
            backend.generate(base, [replace(ROWS[0], image=None)], sampling())
        with pytest.raises(InvalidRequest, match="ask for 2 or more"):
            backend.generate(base, ROWS, replace(sampling(), frames=None))

    def test_one_step_of_a_schedule_that_is_stretched(self, backend, base):
        with pytest.raises(InvalidRequest, match="2 steps or more") as refused:
            backend.generate(base, ROWS, sampling(2, 1))
        assert refused.value.param == "num_inference_steps"

    def test_a_policy(self, backend, base):
        assert backend.chosen(base, ROWS, sampling()) is ROWS
        with pytest.raises(InvalidRequest, match="no policies"):
            backend.chosen(base, ROWS, sampling(policy=True))

    def test_weights_of_another_kind(self, backend, base, tmp_path):
        ref = WeightsRef(name="p", version=1, digest="p")
        with pytest.raises(WeightsCorrupt, match="kind 'policy'"):
            backend.load(WeightSet(ref, backend.name, "policy", base, (), tmp_path))

    def test_another_checkpoint(self, tmp_path):
        tiny_t2v.save_checkpoint(tmp_path)
        with pytest.raises(ConfigError, match="TextToVideoSDPipeline, and this backend runs LTXImageToVideoPipeline"):
            open_backend(tmp_path)

    def test_a_folder_without_a_tokenizer(self, tmp_path):
        save_checkpoint(tmp_path)
        for file in (tmp_path / "tokenizer").iterdir():
            file.unlink()
        with pytest.raises(ConfigError, match="fetch or make the checkpoint again"):
            open_backend(tmp_path)


def test_another_set_of_weights(backend, base, tmp_path):
    other = full(backend, save_checkpoint(tmp_path, seed=8), "other")
    backend.load(other)
    got, plain = (backend.generate(weights, ROWS[:1], sampling(2, 2)) for weights in (other, base))
    assert (got != plain).any()
    np.testing.assert_array_equal(
        got, (again := open_backend(tmp_path)).generate(full(again), ROWS[:1], sampling(2, 2))
    )


def test_tiles_of_frames_make_nearly_the_same(backend, base, folder):
    tiled = open_backend(folder, vae_tiling=True)
    got, plain = (one.generate(base, ROWS[:1], sampling(2, 2)).astype(int) for one in (tiled, backend))
    assert np.abs(got - plain).max() <= 1  # frames this small are one tile


def test_prompts_are_counted_with_their_end(backend):
    assert backend.prompt_length("an owl") == (8, 128)
