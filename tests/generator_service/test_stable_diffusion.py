import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from generator_service.backends.interface import Row, Sampling
from generator_service.backends.sd_checkpoint import SAMPLERS
from protocol.errors import Cancelled, InvalidRequest, UnknownClass
from tests.generator_service.tiny_sd import full, open_backend, save_checkpoint

# raised inside diffusers' DPM-Solver and UniPC, for torch and numpy 2 together
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

PROMPTS = ["an owl", "cats of 3 sizes, on a mat", "x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def xl_folder(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("xl"), xl=True)


@pytest.fixture(scope="module")
def backend(folder):
    return open_backend(folder)


@pytest.fixture(scope="module")
def base(backend):
    return full(backend)


@pytest.fixture(scope="module")
def xl(xl_folder):
    return open_backend(xl_folder)


def picture(seed: int, size: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def rows(count: int = 3, scale: float = 3.0, **more) -> list[Row]:
    return [Row(seed=n, label=None, prompt=PROMPTS[n], guidance_scale=scale, **more) for n in range(count)]


def pipeline(kind, folder, backend, sampler: str, **parts):
    """A stock pipeline, read from the same folder by diffusers itself."""
    scheduler = backend.checkpoint(full(backend)).scheduler(sampler)
    tokenizers = {path.name: CLIPTokenizer.from_pretrained(path) for path in folder.glob("tokenizer*")}
    parts |= tokenizers | {
        "unet": UNet2DConditionModel.from_pretrained(folder / "unet"),
        "vae": AutoencoderKL.from_pretrained(folder / "vae"),
        "text_encoder": CLIPTextModel.from_pretrained(folder / "text_encoder"),
        "scheduler": scheduler,
    }
    if kind is StableDiffusionXLPipeline:
        parts["text_encoder_2"] = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2")
        parts |= {"force_zeros_for_empty_prompt": True, "add_watermarker": False}
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    made = kind(**parts)
    made.set_progress_bar_config(disable=True)
    return made


def generators(count: int = 3) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


class TestAgainstTheStockPipelines:
    @pytest.mark.parametrize("sampler", SAMPLERS)
    @pytest.mark.parametrize("steps", [1, 6])
    def test_text_to_image(self, backend, base, folder, sampler, steps):
        stock = pipeline(StableDiffusionPipeline, folder, backend, sampler)
        expected = stock(
            PROMPTS,
            negative_prompt=["", "an", "blurry"],
            guidance_scale=3.0,
            num_inference_steps=steps,
            generator=generators(),
            output_type="pt",
        ).images
        wanted = [
            Row(seed=n, label=None, prompt=prompt, negative_prompt=negative, guidance_scale=3.0)
            for n, (prompt, negative) in enumerate(zip(PROMPTS, [None, "an", "blurry"], strict=True))
        ]
        got = backend.sample(base, wanted, Sampling(steps, sampler, guided=True))
        torch.testing.assert_close((got + 1) / 2, expected, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("sampler", ["ddim", "dpm-solver", "euler", "euler-a", "unipc"])
    @pytest.mark.parametrize("strength", [0.75, 0.3])
    def test_image_to_image(self, backend, base, folder, sampler, strength):
        """The stock pipeline is given our latents of the image, since it would draw them from the posterior."""
        images = np.stack([picture(n) for n in range(3)])
        stock = pipeline(StableDiffusionImg2ImgPipeline, folder, backend, sampler)
        expected = stock(
            PROMPTS,
            image=backend.checkpoint(base).encode(images),
            strength=strength,
            guidance_scale=3.0,
            num_inference_steps=7,
            generator=generators(),
            output_type="pt",
        ).images
        wanted = [Row(n, None, 3.0, PROMPTS[n], image=images[n]) for n in range(3)]
        got = backend.sample(base, wanted, Sampling(7, sampler, strength, guided=True))
        torch.testing.assert_close((got + 1) / 2, expected, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("sampler", ["ddim", "euler"])
    @pytest.mark.parametrize("negative", [None, "blurry"])
    def test_xl(self, xl, xl_folder, sampler, negative):
        stock = pipeline(StableDiffusionXLPipeline, xl_folder, xl, sampler)
        expected = stock(
            PROMPTS,
            negative_prompt=None if negative is None else [negative] * 3,
            guidance_scale=3.0,
            num_inference_steps=5,
            generator=generators(),
            height=16,
            width=16,
            output_type="pt",
        ).images
        got = xl.sample(full(xl), rows(negative_prompt=negative), Sampling(5, sampler, guided=True))
        torch.testing.assert_close((got + 1) / 2, expected, atol=1e-5, rtol=0)

    def test_velocity_prediction(self, tmp_path):
        folder = save_checkpoint(tmp_path, prediction="v_prediction")
        backend = open_backend(folder)
        stock = pipeline(StableDiffusionPipeline, folder, backend, "ddim")
        expected = stock(
            PROMPTS, guidance_scale=3.0, num_inference_steps=5, generator=generators(), output_type="pt"
        ).images
        got = backend.sample(full(backend), rows(), Sampling(5, "ddim", guided=True))
        torch.testing.assert_close((got + 1) / 2, expected, atol=1e-5, rtol=0)


class TestRowsAndTheirMates:
    @pytest.mark.parametrize("sampler", SAMPLERS)
    def test_a_row_does_not_depend_on_its_batch_mates(self, backend, base, sampler):
        wanted = [
            Row(5, None, 3.0, "an owl", "blurry"),
            Row(6, None, 1.0, "a cat", None, picture(1)),
            Row(7, None, 8.0, "dogs", None, picture(2)),
            Row(8, None, 2.0, "an owl"),
        ]
        sampling = Sampling(6, sampler, 0.6, guided=True)
        together = backend.sample(base, wanted, sampling)
        for at, row in enumerate(wanted):
            alone = backend.sample(base, [row], sampling)[0]
            torch.testing.assert_close(together[at], alone, atol=1e-3, rtol=0)
        reversed_ = backend.sample(base, wanted[::-1], sampling).flip(0)
        torch.testing.assert_close(together, reversed_, atol=1e-3, rtol=0)

    def test_every_setting_of_a_row_counts(self, backend, base):
        sampling = Sampling(6, "ddim", guided=True)
        row = Row(1, None, 3.0, "an owl", "blurry")
        others = [
            Row(2, None, 3.0, "an owl", "blurry"),
            Row(1, None, 5.0, "an owl", "blurry"),
            Row(1, None, 3.0, "a cat", "blurry"),
            Row(1, None, 3.0, "an owl", None),
        ]
        images = backend.sample(base, [row, *others], sampling)
        assert ((images[1:] - images[0]).abs().amax(dim=(1, 2, 3)) > 5e-3).all()

    @pytest.mark.parametrize("scale", [0.0, 1.0])
    def test_guidance_up_to_one_is_off_in_a_guided_batch(self, backend, base, scale):
        plain = backend.sample(base, rows(), Sampling(5, "ddim"))
        guided = backend.sample(base, rows(scale=scale), Sampling(5, "ddim", guided=True))
        torch.testing.assert_close(plain, guided, atol=1e-4, rtol=0)

    def test_equal_to_the_bit_at_equal_shape(self, backend, base):
        sampling = Sampling(5, "euler-a", guided=True)
        first = backend.generate(base, rows(), sampling)
        backend.generate(base, rows(1), sampling)
        np.testing.assert_array_equal(first, backend.generate(base, rows(), sampling))

    @pytest.mark.parametrize("sampler", SAMPLERS)
    def test_no_steps_are_left_at_small_strength(self, backend, base, sampler):
        wanted = [Row(1, None, prompt="an owl", image=picture(1))]
        got = backend.generate(base, wanted, Sampling(5, sampler, 0.1))
        np.testing.assert_array_equal(got[0], picture(1))

    def test_init_images_are_resized(self, backend, base):
        large = picture(3, 40)
        small = np.asarray(Image.fromarray(large).resize((16, 16), Image.Resampling.BICUBIC))
        first, second = (
            backend.generate(base, [Row(1, None, image=image)], Sampling(5, "ddim", 0.5)) for image in (large, small)
        )
        np.testing.assert_array_equal(first, second)

    def test_pndm_from_an_image_is_its_whole_schedule_from_there(self, backend, base, monkeypatch):
        """All but the first of its steps: the model is called at the last times, the second of them twice."""
        checkpoint, seen = backend.checkpoint(base), []
        predict = checkpoint.predict
        monkeypatch.setattr(
            checkpoint, "predict", lambda latents, times, c: seen.append(times[0].item()) or predict(latents, times, c)
        )
        backend.sample(base, [Row(1, None, image=picture(1))], Sampling(5, "pndm", 0.6))
        assert seen == [401, 201, 201, 1]


class TestSteps:
    def test_are_told_one_by_one_and_may_end_it(self, backend, base):
        told = []
        wanted = [Row(1, None, prompt="x"), Row(2, None, prompt="x", image=picture(1))]
        backend.sample(base, wanted, Sampling(4, "ddim", 0.5), lambda done, total: told.append((done, total)))
        assert told == [(n, 6) for n in range(1, 7)]

        def cancel(done, total):
            if done == 2:
                raise Cancelled("enough")

        with pytest.raises(Cancelled):
            backend.sample(base, wanted, Sampling(4, "ddim"), cancel)

    def test_more_steps_than_the_schedule_has(self, backend, base):
        with pytest.raises(InvalidRequest, match="too many") as refused:
            backend.sample(base, rows(), Sampling(1000, "ddim"))
        assert refused.value.param == "num_inference_steps"

    def test_a_label_of_weights_without_classes(self, backend, base):
        with pytest.raises(UnknownClass, match="they know none"):
            backend.sample(base, [Row(1, 0)], Sampling(2, "ddim"))


class TestSettings:
    @pytest.mark.parametrize("settings", [{"attention": "sliced"}, {"dtype": "bfloat16"}], ids=str)
    def test_what_saves_memory_makes_the_same_images_nearly(self, backend, base, folder, settings):
        got = open_backend(folder, **settings).sample(base, rows(), Sampling(4, "ddim", guided=True))
        expected = backend.sample(base, rows(), Sampling(4, "ddim", guided=True))
        tolerance = 0.1 if "dtype" in settings else 1e-4
        torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)

    def test_large_images_are_decoded_in_tiles(self, folder):
        """A decoder normalises over its tile, so that images differ a little; unrelated ones by more than a std."""
        whole, tiled = (open_backend(folder, image_size=48, vae_tiling=tiling) for tiling in (False, True))
        expected, got = (one.sample(full(one), rows(1), Sampling(2, "ddim")) for one in (whole, tiled))
        assert 0 < (got - expected).abs().mean() < 0.5 * expected.std()

    def test_the_image_size(self, folder):
        backend = open_backend(folder, image_size=24)
        assert backend.native_size() == (24, 24)
        assert backend.generate(full(backend), rows(2), Sampling(2, "ddim")).shape == (2, 24, 24, 3)
