"""The vision-language model on this machine, on a Qwen2.5-VL of random weights that is saved and loaded as it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

from generator_service.language.vision_chat import Config, VisionChat
from protocol import codec
from protocol.errors import ConfigError, LanguageUnavailable
from tests.generator_service.language.tiny_language import save_blip, save_chat, save_vision_chat

NEW = 5  # tokens of an answer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vision_chat(tmp_path_factory.mktemp("vision"))


@pytest.fixture(scope="module")
def loaded(folder: Path) -> VisionChat:
    return VisionChat(Config(model=str(folder), device="cpu", max_new_tokens=NEW, batch_size=2))


def picture(number: int) -> np.ndarray:
    """Of another size each."""
    return np.random.default_rng(number).integers(0, 256, (16, 16 + 8 * (number % 3), 3), dtype=np.uint8)


def conversation(number: int, image: np.ndarray) -> list[dict]:
    url = f"data:image/png;base64,{codec.image_to_base64(image)}"
    parts = [
        {"type": "text", "text": "a photo " * (number + 1)},
        {"type": "image_url", "image_url": {"url": url}},
    ]
    return [{"role": "system", "content": "which is"}, {"role": "user", "content": parts}]


CONVERSATIONS = [conversation(number, picture(number)) for number in range(3)]


def by_hand(folder: Path, number: int, temperature: float, top_p: float, seed: int) -> str:
    """The answer by whole forward passes, one token at a time: no batch, no padding, no cache; the nucleus and the
    Gumbel noise from their definitions."""
    processor = AutoProcessor.from_pretrained(folder)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).eval()
    text = f"<s> system which is </s> <s> user {'a photo ' * (number + 1)} <|vision_start|><|image_pad|><|vision_end|> "
    inputs = processor(
        text=[text + "</s> <s> assistant"], images=[Image.fromarray(picture(number))], return_tensors="pt"
    )
    generator, said = torch.Generator().manual_seed(seed), []
    for _ in range(NEW):
        with torch.no_grad():
            logits = model(**inputs).logits[0, -1]
        uniform = torch.exp(-torch.empty(len(logits)).exponential_(generator=generator))
        if temperature:
            chances, order = torch.softmax(logits / temperature, 0).sort(descending=True)
            inside = order[: int((chances.cumsum(0) - chances < top_p).sum())]  # the first that reach top_p together
            noisy = logits / temperature - torch.log(-torch.log(uniform))
            logits = torch.full_like(logits, -torch.inf).index_put((inside,), noisy[inside])
        said.append(int(logits.argmax()))
        if said[-1] == processor.tokenizer.eos_token_id:
            break
        for name, new in (("input_ids", said[-1]), ("attention_mask", 1), ("mm_token_type_ids", 0)):
            inputs[name] = torch.cat([inputs[name], torch.tensor([[new]])], dim=1)
    return processor.tokenizer.decode(said, skip_special_tokens=True)


@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 0.9), (0.8, 0.9), (1.5, 0.5)])
def test_batched_answers_are_those_of_each_alone(folder: Path, temperature: float, top_p: float):
    settings = {"temperature": temperature, "top_p": top_p, "batch_size": 2, "max_new_tokens": NEW}
    answers = VisionChat(Config(model=str(folder), device="cpu", **settings)).complete(CONVERSATIONS, range(3))
    assert answers == [by_hand(folder, number, temperature, top_p, number) for number in range(3)]


def test_answers_depend_on_the_picture_and_on_the_seed(loaded: VisionChat):
    same = [conversation(0, picture(number)) for number in (0, 3, 6)]
    first, *others = loaded.complete(same, [1, 1, 1])
    assert first not in others
    assert len(set(loaded.complete([same[0]] * 3, [1, 2, 3]))) > 1


def test_it_answers_without_a_picture_too(loaded: VisionChat):
    (answer,) = loaded.complete([[{"role": "user", "content": "a dog"}]], [0])
    assert isinstance(answer, str) and answer


def test_once_closed_it_answers_no_more(folder: Path):
    model = VisionChat(Config(model=str(folder), device="cpu"))
    model.close()
    assert [type(answer) for answer in model.complete(CONVERSATIONS, range(3))] == [LanguageUnavailable] * 3


@pytest.mark.parametrize(
    "template", ["{% for turn in messages %}U0{% endfor %}", "{{ raise_exception('no') }}"], ids=["unseen", "refused"]
)
def test_a_template_that_shows_no_pictures_is_refused(tmp_path: Path, template: str):
    with pytest.raises(ConfigError, match="no processor with a chat template for pictures"):
        VisionChat(Config(model=str(save_vision_chat(tmp_path, template)), device="cpu"))


@pytest.mark.parametrize("save", [save_chat, save_blip], ids=["reads text alone", "does not chat"])
def test_other_models_are_refused(tmp_path: Path, save):
    with pytest.raises(ConfigError, match="no processor with a chat template for pictures"):
        VisionChat(Config(model=str(save(tmp_path)), device="cpu"))


def test_a_model_that_is_not_there_is_told(tmp_path: Path):
    with pytest.raises(ConfigError, match="there is no folder"):
        VisionChat(Config(model=str(tmp_path / "none"), device="cpu"))


def test_defaults_are_the_papers():
    chosen = Config(model="x")
    assert (chosen.temperature, chosen.top_p, chosen.max_new_tokens) == (0.8, 0.9, 256)
