from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from generator_service.backends.interface import Row, Sampling
from generator_service.backends.lora_sets import LORA_FILE, VISUAL_FILE
from protocol.errors import ConfigError, UnknownClass, WeightsCorrupt
from protocol.messages import WeightsRef
from tests.generator_service.tiny_sd import WIDTH, full, lora_set, open_backend, save_checkpoint, save_lora

CLASSES = ("alpha", "beta")
MEANS = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0))
SAMPLING = Sampling(4, "ddim", guided=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def backend(folder):
    return open_backend(folder, max_resident=2)


@pytest.fixture(scope="module")
def base(backend):
    return full(backend)


@pytest.fixture(scope="module")
def loras(backend, base, tmp_path_factory):
    """Three weight sets, one more than may be resident."""
    unet = backend.checkpoint(base).unet
    folders = [save_lora(tmp_path_factory.mktemp(f"lora.{seed}"), unet, seed) for seed in range(3)]
    return [lora_set(base, folder) for folder in folders]


@pytest.fixture(scope="module")
def tokened(backend, base, tmp_path_factory):
    """One LoRA with visual tokens, as a set of each kind."""
    folder = save_lora(tmp_path_factory.mktemp("tokened"), backend.checkpoint(base).unet, 5, MEANS)
    sets = {kind: lora_set(base, folder, CLASSES, kind) for kind in ("none", "class", "image")}
    refs = {kind: WeightsRef(name=kind, version=1, digest=kind) for kind in sets}
    return {kind: replace(weights, ref=refs[kind]) for kind, weights in sets.items()}


def rows(**more) -> list[Row]:
    return [Row(n, None, 3.0, prompt, **more) for n, prompt in enumerate(["an owl", "cats"])]


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)


class TestLoras:
    def test_equal_to_the_stock_pipeline_with_the_same_file(self, backend, loras, folder):
        stock = StableDiffusionPipeline.from_pretrained(
            folder,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            image_encoder=None,
            unet=UNet2DConditionModel.from_pretrained(folder / "unet"),
            vae=backend.checkpoint(loras[0]).vae,
            text_encoder=backend.checkpoint(loras[0])._prompts._encoders[0],
            tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
            scheduler=DDIMScheduler.from_pretrained(folder / "scheduler"),
        )
        stock.set_progress_bar_config(disable=True)
        stock.load_lora_weights(loras[1].folder, adapter_name="one")
        for scale in (1.0, 0.3):
            stock.set_adapters("one", scale)
            expected = stock(
                [row.prompt for row in rows()],
                guidance_scale=3.0,
                num_inference_steps=4,
                generator=[torch.Generator().manual_seed(seed) for seed in range(2)],
                output_type="pt",
            ).images
            got = backend.sample(loras[1], rows(), replace(SAMPLING, lora_scale=scale))
            torch.testing.assert_close((got + 1) / 2, expected, atol=1e-5, rtol=0)

    def test_switching_leaves_nothing_behind(self, backend, base, loras):
        sets = [base, *loras]
        first = [backend.sample(weights, rows(), SAMPLING) for weights in sets]
        for at in (2, 0, 1, 3, 0, 3, 2):
            assert torch.equal(backend.sample(sets[at], rows(), SAMPLING), first[at])
        gaps = [(a - b).abs().max() for i, a in enumerate(first) for b in first[:i]]
        assert min(gaps) > 5e-3

    def test_at_scale_zero_it_is_the_base(self, backend, base, loras):
        got = backend.sample(loras[0], rows(), replace(SAMPLING, lora_scale=0.0))
        assert torch.equal(got, backend.sample(base, rows(), SAMPLING))

    @pytest.mark.parametrize("layout", ["old", "kohya"])
    def test_other_layouts_of_the_file(self, backend, base, loras, tmp_path, layout):
        tensors = load_file(loras[0].folder / LORA_FILE)
        if layout == "old":
            renamed = convert_state_dict_to_diffusers(tensors)
            scaled = {name: value * 2 if ".up." in name else value for name, value in renamed.items()}  # alpha / rank
        else:
            scaled = convert_state_dict_to_kohya(dict(tensors))
            scaled = {n: torch.tensor(8.0) if n.endswith("alpha") else v.contiguous() for n, v in scaled.items()}
        save_file(scaled, tmp_path / LORA_FILE)
        got = backend.sample(lora_set(base, tmp_path), rows(), SAMPLING)
        torch.testing.assert_close(got, backend.sample(loras[0], rows(), SAMPLING), atol=1e-5, rtol=0)

    def test_no_more_are_resident_than_may_be(self, backend, loras):
        for weights in loras:
            backend.load(weights)
        resident = backend.checkpoint(loras[0]).unet.peft_config
        assert len(resident) == 2

    @pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
    def test_adapters_of_others_are_left_alone(self, folder, loras):
        """An adaptation trains one of its own in the same UNet."""
        backend = open_backend(folder)
        base = full(backend)
        expected = [backend.sample(weights, rows(), SAMPLING) for weights in (base, loras[0])]
        checkpoint = backend.checkpoint(base)
        checkpoint.unet.add_adapter(next(iter(checkpoint.unet.peft_config.values())), "learning")
        checkpoint.use("learning")
        ours = [parameter for name, parameter in checkpoint.unet.named_parameters() if ".learning." in name]
        with torch.no_grad():
            for parameter in ours:
                parameter.add_(0.1)
        before = [parameter.clone() for parameter in ours]
        for weights, images in zip((base, loras[0], base), [*expected, expected[0]], strict=True):
            assert torch.equal(backend.sample(weights, rows(), SAMPLING), images)
        checkpoint.use("learning")
        assert all(parameter.requires_grad for parameter in ours)
        assert all(torch.equal(parameter, old) for parameter, old in zip(ours, before, strict=True))
        trainable = [name for name, parameter in checkpoint.unet.named_parameters() if parameter.requires_grad]
        assert len(trainable) == len(ours)

    def test_on_another_full_checkpoint(self, backend, base, loras, tmp_path):
        other = full(backend, save_checkpoint(tmp_path, seed=8), "other")
        alone = open_backend(other.folder)
        wanted = lora_set(full(alone), loras[0].folder)
        expected = alone.sample(wanted, rows(), SAMPLING)
        assert torch.equal(backend.sample(lora_set(other, loras[0].folder), rows(), SAMPLING), expected)
        plain = alone.sample(full(alone), rows(), SAMPLING)
        assert torch.equal(backend.sample(other, rows(), SAMPLING), plain)
        own = open_backend(base.folder)
        assert torch.equal(backend.sample(base, rows(), SAMPLING), own.sample(full(own), rows(), SAMPLING))


class TestVisualTokens:
    @pytest.fixture
    def told(self, backend, base, monkeypatch):
        """The embeddings that the UNet was given last, [B, T, D]."""
        checkpoint, told = backend.checkpoint(base), []
        predict = checkpoint.predict
        monkeypatch.setattr(
            checkpoint, "predict", lambda latents, times, c: told.append(c.embeddings) or predict(latents, times, c)
        )
        return told

    def test_rows_get_the_mean_of_their_class_and_the_negative_ones_none(self, backend, base, tokened, told):
        wanted = [Row(1, 1, 3.0, "an owl"), Row(2, None, 3.0, "cats", "blurry"), Row(3, 0, 3.0, "cats")]
        backend.sample(tokened["class"], wanted, SAMPLING)
        text = backend.checkpoint(base).conditions(["an owl", "cats", "cats", None, "blurry", None]).embeddings
        assert torch.equal(told[0][[0, 2], -1], MEANS[[1, 0]])
        text[[0, 2], -1] = MEANS[[1, 0]]
        assert torch.equal(told[0], text)

    def test_the_feature_of_its_image_or_else_the_mean(self, backend, base, tokened, told):
        wanted = [Row(1, 1, 3.0, "an owl", image=picture(1)), Row(2, 1, 3.0, "cats"), Row(3, None, 3.0, "cats")]
        wanted.append(Row(4, None, 3.0, "x", image=picture(2)))
        backend.sample(tokened["image"], wanted, SAMPLING)
        checkpoint = backend.checkpoint(base)
        features = checkpoint.visual_features(np.stack([picture(1), picture(2)]))
        bare = checkpoint.conditions(["cats"]).embeddings[0, -1]
        torch.testing.assert_close(told[0][:4, -1], torch.stack([features[0], MEANS[1], bare, features[1]]))

    def test_none(self, backend, base, tokened, told):
        backend.sample(tokened["none"], [Row(1, 1, 3.0, "an owl")], SAMPLING)
        assert torch.equal(told[0], backend.checkpoint(base).conditions(["an owl", None]).embeddings)

    def test_a_row_does_not_depend_on_its_batch_mates(self, backend, tokened):
        wanted = [Row(1, 1, 3.0, "an owl"), Row(2, None, 3.0, "cats"), Row(3, 0, 3.0, "x", image=picture(1))]
        together = backend.sample(tokened["image"], wanted, SAMPLING)
        for at, row in enumerate(wanted):
            alone = backend.sample(tokened["image"], [row], SAMPLING)[0]
            torch.testing.assert_close(together[at], alone, atol=1e-3, rtol=0)

    def test_a_label_that_there_is_no_mean_of(self, backend, tokened):
        with pytest.raises(UnknownClass, match="use 0 to 1"):
            backend.sample(tokened["class"], [Row(1, 2)], SAMPLING)

    def test_features_without_an_image_encoder(self, loras, tmp_path):
        backend = open_backend(save_checkpoint(tmp_path / "sd", image_encoder=None))
        base = full(backend)
        folder = save_lora(tmp_path / "lora", backend.checkpoint(base).unet, 1, MEANS)
        weights = lora_set(base, folder, CLASSES, "image")
        with pytest.raises(ConfigError, match="set image_encoder"):
            backend.sample(weights, [Row(1, 0, image=picture(1))], SAMPLING)
        backend.sample(weights, [Row(1, 0)], SAMPLING)  # the mean of its class needs none


class TestWhatDoesNotFit:
    def damaged(self, loras, folder, change):
        tensors = load_file(loras[0].folder / LORA_FILE)
        change(tensors)
        folder.mkdir()
        save_file(tensors, folder / LORA_FILE)
        return folder

    def test_a_lora_of_another_base_is_named_with_both_shapes(self, backend, base, loras, tmp_path):
        xl = open_backend(save_checkpoint(tmp_path / "xl", xl=True))
        foreign = lora_set(base, save_lora(tmp_path / "lora", xl.checkpoint(full(xl)).unet, 1))
        with pytest.raises(WeightsCorrupt, match=r"another base checkpoint.*attn2.*\[32, 32\] there and \[32, 16\]"):
            backend.load(foreign)

    def test_a_lora_of_modules_that_are_not_there(self, backend, base, loras, tmp_path):
        def rename(tensors):
            for name in [name for name in tensors if "attn1" in name]:
                tensors[name.replace("attn1", "attn9")] = tensors.pop(name)

        with pytest.raises(WeightsCorrupt, match=r"has no .*attn9"):
            backend.load(lora_set(base, self.damaged(loras, tmp_path / "d", rename)))

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda tensors: tensors.popitem(), "not whole"),
            (lambda tensors: next(iter(tensors.values())).fill_(torch.nan), "not finite"),
            (lambda tensors: tensors.update({"text_encoder.q.lora_A.weight": torch.ones(1, 1)}), "not of a UNet"),
            (lambda tensors: tensors.clear(), "holds no LoRA"),
        ],
    )
    def test_damage(self, backend, base, loras, tmp_path, change, words):
        with pytest.raises(WeightsCorrupt, match=words):
            backend.load(lora_set(base, self.damaged(loras, tmp_path / "d", change)))

    @pytest.mark.parametrize("data", [None, b"nothing of the kind"])
    def test_no_file(self, backend, base, tmp_path, data):
        if data is not None:
            (tmp_path / LORA_FILE).write_bytes(data)
        with pytest.raises(WeightsCorrupt, match=LORA_FILE):
            backend.load(lora_set(base, tmp_path))

    @pytest.mark.parametrize(
        "means", [None, torch.zeros(3, WIDTH), torch.zeros(2, 8), torch.full((2, WIDTH), torch.nan)]
    )
    def test_visual_tokens(self, backend, base, tmp_path, means):
        folder = save_lora(tmp_path / "lora", backend.checkpoint(base).unet, 1, means)
        with pytest.raises(WeightsCorrupt, match=VISUAL_FILE):
            backend.load(lora_set(base, folder, CLASSES, "class"))

    def test_an_unknown_kind(self, backend, base, loras):
        with pytest.raises(WeightsCorrupt, match="'class_embedding'"):
            backend.load(replace(loras[0], kind="class_embedding"))

    def test_a_refused_lora_leaves_nothing_behind(self, backend, base, loras, tmp_path):
        before = backend.sample(base, rows(), SAMPLING)
        with pytest.raises(WeightsCorrupt):
            backend.load(lora_set(base, self.damaged(loras, tmp_path / "d", lambda tensors: tensors.popitem())))
        assert torch.equal(backend.sample(base, rows(), SAMPLING), before)
