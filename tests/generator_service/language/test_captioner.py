from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer, Blip2Processor, ViTImageProcessor

from generator_service.language.captioner import Captioner, Config
from protocol.errors import ConfigError
from tests.generator_service.language.tiny_language import save_blip, save_blip2, save_chat, save_encoder_decoder

SAVED = {"blip": save_blip, "blip-2": save_blip2, "encoder-decoder": save_encoder_decoder}


@pytest.fixture(scope="module", params=SAVED)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save: Callable[[Path], Path] = SAVED[request.param]
    return save(tmp_path_factory.mktemp(request.param))


def pictures(count: int) -> list[np.ndarray]:
    """Of different sizes, dark and bright by turns."""
    rng = np.random.default_rng(0)
    return [rng.integers(200 * (i % 2), 20 + 235 * (i % 2), (17 + i, 30, 3), dtype=np.uint8) for i in range(count)]


def captioner(folder: Path, **settings) -> Captioner:
    return Captioner(Config(model=str(folder), device="cpu", max_new_tokens=6, **settings))


def test_batched_captions_are_those_of_each_alone(folder: Path):
    images = pictures(7)
    model = captioner(folder, batch_size=3)
    said = model.describe(images)
    assert said == [model.describe([image])[0] for image in images]
    assert len(set(said)) > 1  # it looks at the pictures


def test_an_encoder_decoder_says_what_it_says_by_hand(tmp_path: Path):
    folder = save_encoder_decoder(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    tokenizer, processor = AutoTokenizer.from_pretrained(folder), ViTImageProcessor.from_pretrained(folder)
    for image in pictures(2):
        pixels = processor(Image.fromarray(image), return_tensors="pt")["pixel_values"]
        tokens = torch.tensor([[1]])
        for _ in range(6):
            with torch.no_grad():
                logits = model(pixel_values=pixels, decoder_input_ids=tokens).logits[0, -1]
            tokens = torch.cat([tokens, logits.argmax().view(1, 1)], dim=1)
            if tokens[0, -1] == 2:
                break
        expected = tokenizer.decode(tokens[0, 1:], skip_special_tokens=True)
        assert captioner(folder).describe([image]) == [expected.strip(" .,;:")]


def test_blip2_goes_on_from_a_prompt(tmp_path: Path):
    folder = save_blip2(tmp_path)
    (image,) = pictures(1)
    processor = Blip2Processor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    asked = dict(processor(images=Image.fromarray(image), text="a photo of", return_tensors="pt"))
    tokens: list[int] = []
    for _ in range(6):
        with torch.no_grad():
            tokens.append(int(model(**asked).logits[0, -1].argmax()))
        if tokens[-1] == 2:
            break
        asked["input_ids"] = torch.cat([asked["input_ids"], torch.tensor([[tokens[-1]]])], dim=1)
        asked["attention_mask"] = torch.ones_like(asked["input_ids"])
    expected = processor.tokenizer.decode(tokens, skip_special_tokens=True)
    assert captioner(folder, prompt="a photo of").describe([image]) == [expected.strip(" .,;:")] != [""]


@pytest.mark.parametrize("prompt", ["a photo of", "A  photo of "])
def test_the_prompt_is_no_part_of_the_caption(tmp_path: Path, prompt: str):
    model = captioner(save_blip(tmp_path), prompt=prompt)
    assert model._caption("a photo of a dog\non  grass .") == "a dog on grass"
    assert model._caption("on grass") == "on grass"


def test_models_that_describe_no_pictures_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="takes no prompt"):
        captioner(save_encoder_decoder(tmp_path / "v"), prompt="a photo of")
    with pytest.raises(ConfigError, match="cannot load"):
        captioner(save_chat(tmp_path / "c"))
    with pytest.raises(ConfigError, match="no folder"):
        captioner(tmp_path / "nothing")
