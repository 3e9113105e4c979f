import json
import logging
from concurrent.futures import ThreadPoolExecutor

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPTextModel, CLIPVisionModelWithProjection

from generator_service.backends import clip_vision
from generator_service.backends.clip_vision import clip_pixels
from generator_service.backends.interface import Row, Sampling
from generator_service.backends.prompt_embedding import Conditions
from generator_service.backends.sd_checkpoint import SDCheckpoint
from generator_service.backends.stable_diffusion import Config, StableDiffusionBackend
from protocol.errors import ConfigError, WeightsCorrupt
from tests.generator_service.tiny_sd import TOKENS, WIDTH, full, open_backend, save_checkpoint, save_image_encoder

PROMPTS = ["an owl", "cats of 3 sizes", "x", "an owl", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def checkpoint(folder):
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    return open_checkpoint(save_checkpoint(tmp_path_factory.mktemp("xl"), xl=True))


def open_checkpoint(folder, **settings) -> SDCheckpoint:
    return SDCheckpoint(folder, torch.device("cpu"), torch.float32, **settings)


def pictures(count: int, height: int = 16, width: int = 16) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


class TestPrompts:
    @pytest.mark.parametrize("which", ["checkpoint", "xl"])
    def test_row_i_of_a_batch_is_that_row_alone(self, which, request):
        checkpoint = request.getfixturevalue(which)
        width = checkpoint.unet.config.cross_attention_dim
        visual = torch.randn(5, width, generator=torch.Generator().manual_seed(0))
        visual[[1, 4]] = torch.nan
        together = checkpoint.conditions(PROMPTS, visual)
        for at, prompt in enumerate(PROMPTS):
            alone = checkpoint.conditions([prompt], visual[at : at + 1])
            for mine, its in zip(together[[at]]._parts(), alone._parts(), strict=True):
                assert mine is its is None or torch.equal(mine, its)

    def test_embeddings_are_the_text_encoders_own(self, checkpoint, folder):
        encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
        ids = checkpoint._prompts._tokenizers[0](PROMPTS, padding="max_length", return_tensors="pt").input_ids
        with torch.no_grad():
            expected = encoder(ids).last_hidden_state
        torch.testing.assert_close(checkpoint.conditions(PROMPTS).embeddings, expected, atol=1e-5, rtol=0)

    def test_the_visual_token_is_written_over_the_last_position_only(self, checkpoint):
        visual = torch.stack([torch.full((WIDTH,), 2.0), torch.full((WIDTH,), torch.nan)])
        bare, got = checkpoint.conditions(["x", "x"]), checkpoint.conditions(["x", "x"], visual)
        assert torch.equal(got.embeddings[0, -1], visual[0])
        assert torch.equal(got.embeddings[0, :-1], bare.embeddings[0, :-1])
        assert torch.equal(got.embeddings[1], bare.embeddings[1])
        assert torch.equal(bare.embeddings, checkpoint.conditions(["x", "x"]).embeddings)  # what is kept is untouched

    def test_rows_are_chosen_and_joined(self, xl):
        both = Conditions.cat([xl.conditions(["a", "b"]), xl.conditions(["c"])])
        whole = xl.conditions(["a", "b", "c"])
        for at in ([2, 0], torch.tensor([True, False, True]), slice(1, 3)):
            for mine, its in zip(both[at]._parts(), whole[at]._parts(), strict=True):
                assert torch.equal(mine, its)
        assert len(both) == 3 and len(both[1:]) == 2

    def test_no_prompt_is_zeros_where_xl_was_trained_so(self, xl, checkpoint):
        none, empty = xl.conditions([None]), xl.conditions([""])
        assert none.embeddings.abs().max() == 0 and none.pooled.abs().max() == 0
        assert empty.embeddings.abs().max() > 0
        assert torch.equal(checkpoint.conditions([None]).embeddings, checkpoint.conditions([""]).embeddings)

    def test_xl_is_told_its_size(self, xl):
        assert xl.conditions(["a", "b"]).added()["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 2

    def test_long_prompts_are_cut_on_tokens_and_told_once(self, folder, caplog):
        checkpoint = open_checkpoint(folder)
        room = TOKENS - 2  # begin and end
        fits, long = " ".join("x" * room), " ".join("x" * (room + 3))
        with caplog.at_level(logging.WARNING):
            first = checkpoint.conditions([fits, long, "x"])
            checkpoint.conditions([long])
        assert torch.equal(first.embeddings[0], first.embeddings[1])  # what is left of the long one
        told = [record for record in caplog.records if getattr(record, "event", None) == "prompt_cut"]
        assert [(record.tokens, record.prompts) for record in told] == [(3, 1)]

    def test_a_tokenizer_that_does_not_say_how_much_the_text_encoder_reads(self, folder, tmp_path):
        silent = save_checkpoint(tmp_path)
        path = silent / "tokenizer" / "tokenizer_config.json"
        settings = json.loads(path.read_text())
        del settings["model_max_length"]
        path.write_text(json.dumps(settings))
        for prompt in ("an owl", "a" * 200):
            got, expected = (open_checkpoint(place).conditions([prompt]) for place in (silent, folder))
            assert got.embeddings.shape == (1, TOKENS, WIDTH) and torch.equal(got.embeddings, expected.embeddings)

    def test_lengths_are_of_the_tokenizer_that_has_the_least_room(self, tmp_path):
        folder = save_checkpoint(tmp_path, xl=True)
        settings = json.loads((folder / "tokenizer_2" / "tokenizer_config.json").read_text())
        (folder / "tokenizer_2" / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 20}))
        assert open_checkpoint(folder).prompt_length("x x x") == (5, 20)

    def test_lengths_can_be_asked_for_while_prompts_are_encoded(self, checkpoint):
        prompts = ["x " * (n % 90) for n in range(400)]
        with ThreadPoolExecutor(4) as pool:
            lengths = pool.map(checkpoint.prompt_length, prompts)
            checkpoint.conditions(prompts[:75])
        assert list(lengths) == [(n % 90 + 2, TOKENS) for n in range(400)]


class TestModel:
    def test_predictions_are_the_unets(self, checkpoint):
        latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        conditions, times = checkpoint.conditions(["a", "b"]), torch.tensor([10, 900])
        got = checkpoint.predict(latents, times, conditions)
        for at in range(2):
            with torch.no_grad():
                expected = checkpoint.unet(latents[at : at + 1], times[at], conditions.embeddings[at : at + 1]).sample
            torch.testing.assert_close(got[at : at + 1], expected, atol=1e-5, rtol=0)

    def test_latents_are_the_scaled_mode(self, checkpoint, folder):
        images = pictures(20)
        vae = AutoencoderKL.from_pretrained(folder / "vae")
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
        with torch.no_grad():
            mean = vae.encode(pixels).latent_dist.mean
            decoded = vae.decode(mean).sample.clamp(-1, 1)
        latents = checkpoint.encode(images)
        torch.testing.assert_close(latents, mean * 0.5, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(checkpoint.decode(latents), decoded, atol=1e-4, rtol=0)


class TestImageFeatures:
    @pytest.mark.parametrize("shape", [(16, 16), (40, 23), (13, 31)])
    def test_images_are_prepared_as_clip_wants_them(self, shape):
        images = pictures(3, *shape)
        size = {"size": {"shortest_edge": 12}, "crop_size": {"height": 12, "width": 12}}
        expected = CLIPImageProcessor(**size)([Image.fromarray(i) for i in images], return_tensors="pt").pixel_values
        torch.testing.assert_close(clip_pixels(images, 12), expected, atol=0.03, rtol=0)

    def test_are_the_projected_ones(self, checkpoint, folder):
        images = pictures(3)
        encoder = CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder")
        with torch.no_grad():
            expected = encoder(clip_pixels(images, 12)).image_embeds
        torch.testing.assert_close(checkpoint.visual_features(images), expected)

    def test_only_a_batch_of_images_is_prepared_at_once(self, checkpoint, monkeypatch):
        expected, prepared = checkpoint.visual_features(pictures(7)), []
        monkeypatch.setattr(clip_vision, "BATCH", 3)
        monkeypatch.setattr(clip_vision, "clip_pixels", lambda i, side: prepared.append(len(i)) or clip_pixels(i, side))
        torch.testing.assert_close(checkpoint.visual_features(pictures(7)), expected)
        assert prepared == [3, 3, 1]

    def test_of_another_width_than_the_prompts(self, folder, tmp_path):
        narrow = open_checkpoint(folder, image_encoder=save_image_encoder(tmp_path, 8))
        with pytest.raises(ConfigError, match="8 wide and the prompts' 16"):
            narrow.visual_features(pictures(1))

    def test_without_an_encoder(self, tmp_path):
        with pytest.raises(ConfigError, match="set image_encoder"):
            open_checkpoint(save_checkpoint(tmp_path, image_encoder=None)).visual_features(pictures(1))

    def test_an_encoder_from_a_folder_of_its_own(self, tmp_path):
        encoder = save_image_encoder(tmp_path / "clip")
        backend = open_backend(save_checkpoint(tmp_path / "sd", image_encoder=None), image_encoder=str(encoder))
        features = backend.checkpoint(full(backend)).visual_features(pictures(2))
        assert torch.equal(
            features, open_checkpoint(backend.folder, image_encoder=encoder).visual_features(pictures(2))
        )

    def test_an_encoder_that_is_nowhere(self, folder, monkeypatch):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(ConfigError, match="image_encoder 'nobody/clip' is neither"):
            open_backend(folder, image_encoder="nobody/clip")


class TestFolders:
    @pytest.mark.parametrize("component", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
    def test_a_missing_component(self, tmp_path, component):
        folder = save_checkpoint(tmp_path)
        for path in (folder / component).iterdir():
            path.unlink()
        with pytest.raises(ConfigError, match=component):
            open_backend(folder)

    @pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
    @pytest.mark.parametrize("damage", ["missing", "surplus", "bytes"])
    def test_tensors_that_do_not_fit(self, tmp_path, component, damage):
        folder = save_checkpoint(tmp_path)
        path = next((folder / component).glob("*.safetensors"))
        tensors = load_file(path)
        if damage == "missing":
            tensors.popitem()
        if damage == "surplus":
            tensors["surplus.bias"] = torch.zeros(1)
        save_file(tensors, path, metadata={"format": "pt"})
        if damage == "bytes":
            path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(WeightsCorrupt, match=component):
            open_backend(folder)

    def test_a_unet_for_inpainting(self, tmp_path):
        folder = save_checkpoint(tmp_path)
        vae = json.loads((folder / "vae" / "config.json").read_text()) | {"latent_channels": 8}
        (folder / "vae").joinpath("config.json").write_text(json.dumps(vae))
        AutoencoderKL.from_config(vae).save_pretrained(folder / "vae")
        with pytest.raises(ConfigError, match="text-to-image checkpoint"):
            open_backend(folder)

    def test_text_encoders_of_another_width(self, tmp_path):
        wide, narrow = save_checkpoint(tmp_path / "a", xl=True), save_checkpoint(tmp_path / "b")
        (narrow / "unet").rename(narrow / "own")
        (wide / "unet").rename(narrow / "unet")
        with pytest.raises(ConfigError, match="embeddings as wide"):
            open_backend(narrow)

    def test_an_image_size_that_latents_do_not_divide(self, folder):
        with pytest.raises(ConfigError, match="multiple of 2"):
            open_backend(folder, image_size=17)

    @pytest.mark.parametrize("checkpoint", ["nobody/nothing-at-all", "/no/such/folder", "embedded"])
    def test_what_is_neither_a_folder_nor_on_the_hub(self, checkpoint, monkeypatch):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(ConfigError, match="give an existing folder, a hub id"):
            StableDiffusionBackend(Config(checkpoint=checkpoint))


class TestSafety:
    @pytest.fixture
    def checked(self, tmp_path):
        """A checkpoint with a checker, which flags what is nearer to a concept than its threshold."""
        folder = save_checkpoint(tmp_path)
        vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = CLIPConfig(vision_config=vision | {"image_size": 12, "patch_size": 4}, projection_dim=8)
        checker = StableDiffusionSafetyChecker(config)
        torch.nn.init.normal_(checker.concept_embeds, generator=torch.Generator().manual_seed(1))
        checker.save_pretrained(folder / "safety_checker")
        return folder

    def thresholds(self, folder, value: float) -> None:
        path = folder / "safety_checker" / "model.safetensors"
        tensors = load_file(path)
        for name in ("concept_embeds_weights", "special_care_embeds_weights"):
            tensors[name] = torch.full_like(tensors[name], value)
        save_file(tensors, path, metadata={"format": "pt"})

    def test_flagged_images_come_out_black_and_are_counted(self, checked, caplog):
        rows, sampling = [Row(n, None, prompt="x") for n in range(3)], Sampling(2, "ddim")
        off = open_backend(checked)
        expected = off.generate(full(off), rows, sampling)
        self.thresholds(checked, -1.0)  # everything is near enough
        strict = open_backend(checked, safety="black")
        with caplog.at_level(logging.WARNING):
            assert (strict.generate(full(strict), rows, sampling) == 0).all()
        assert [r.images for r in caplog.records if getattr(r, "event", None) == "images_flagged"] == [3]
        self.thresholds(checked, 1.1)  # nothing is
        lenient = open_backend(checked, safety="black")
        np.testing.assert_array_equal(lenient.generate(full(lenient), rows, sampling), expected)

    def test_a_checkpoint_without_one(self, folder):
        with pytest.raises(ConfigError, match="safety_checker"):
            open_backend(folder, safety="black")
