"""A vision-language model on this machine, from transformers: Qwen2.5-VL, or any image-text-to-text checkpoint with a
processor and a chat template.

Knows nothing of faces. Answers are sampled as `chat` does it, from the nucleus of the model's distribution, each
conversation with noise of its own, so that an answer does not depend on what else is in the batch.

    B batch, T tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image
from pydantic import Field
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LogitsProcessorList,
    ProcessorMixin,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from agent.language import Conversation
from generator_service.language.batched import Batched
from generator_service.language.chat import SeededNoise
from generator_service.language.pretrained import PretrainedConfig
from protocol import codec
from protocol.errors import ConfigError


class Config(PretrainedConfig):
    """Settings of the model. The paper's is "Qwen/Qwen2.5-VL-7B-Instruct", with these values (4.2)."""

    batch_size: int = Field(default=4, ge=1, le=4096)  # questions in a forward pass; more need more memory
    temperature: float = Field(default=0.8, ge=0.0, le=2.0)  # 0: the likeliest answer; high: varied, less to the point
    top_p: float = Field(default=0.9, gt=0.0, le=1.0)  # of the likeliest tokens that make up this much; 1: of all
    max_new_tokens: int = Field(default=256, ge=1)  # of an answer


class VisionChat(Batched):
    """Answers conversations with pictures in them, `batch_size` at a time. See `agent.language.ChatModel`."""

    def __init__(self, config: Config):
        """Loads the model. Raises ConfigError when it cannot be found, or does not chat about pictures."""
        super().__init__(config.model, config.batch_size)
        self._config, self._device = config, config.place()
        self._processor = config.open(AutoProcessor.from_pretrained)
        if not isinstance(self._processor, ProcessorMixin) or not self._shows_pictures():
            raise ConfigError(
                f"{config.model!r} has no processor with a chat template for pictures: use a vision-language model "
                "that is tuned to follow instructions, such as Qwen/Qwen2.5-VL-7B-Instruct"
            )
        self._tokenizer = self._processor.tokenizer
        self._tokenizer.padding_side = "left"
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        model = config.open(AutoModelForImageTextToText.from_pretrained, dtype=config.dtype, use_safetensors=True)
        self._model = model.to(self._device).eval()

    def _shows_pictures(self) -> bool:
        """Whether a picture leaves a mark in what the chat template makes of a conversation."""
        turns = [[{"role": "user", "content": [{"type": "text", "text": "U0"}, *more]}] for more in ([], [_PICTURE])]
        try:
            without, shown = (self._processor.apply_chat_template(turn, tokenize=False) for turn in turns)
        except (TemplateError, ValueError):  # ValueError: there is no template
            return False
        return "U0" in shown and len(shown) > len(without)

    @torch.inference_mode()
    def _answer(self, conversations: Sequence[Conversation], seeds: Sequence[int]) -> list[str]:
        texts = [
            self._processor.apply_chat_template(_turns(turns), tokenize=False, add_generation_prompt=True)
            for turns in conversations
        ]
        images = [image for turns in conversations for image in _pictures(turns)]
        asked = self._processor(text=texts, images=images or None, padding=True, return_tensors="pt")
        inputs = {name: self._placed(value) for name, value in asked.items()}  # input_ids int64 [B, T], padded left
        tokens = self._model.generate(
            **inputs,
            do_sample=False,
            num_beams=1,
            max_new_tokens=self._config.max_new_tokens,
            logits_processor=self._sampling(seeds),
            pad_token_id=self._tokenizer.pad_token_id,
        )
        return self._tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def _placed(self, value: torch.Tensor) -> torch.Tensor:
        dtype = self._model.dtype if value.is_floating_point() else value.dtype
        return value.to(self._device, dtype)

    def _sampling(self, seeds: Sequence[int]) -> LogitsProcessorList:
        """None at temperature 0."""
        config, chosen = self._config, LogitsProcessorList()
        if config.temperature > 0.0:
            chosen.append(TemperatureLogitsWarper(config.temperature))
            if config.top_p < 1.0:
                chosen.append(TopPLogitsWarper(config.top_p))
            chosen.append(SeededNoise(seeds, temperature=1.0))
        return chosen


_PICTURE = {"type": "image"}


def _turns(conversation: Conversation) -> list[dict[str, Any]]:
    """As chat templates read them, with a mark in the place of each picture."""
    return [
        {"role": turn["role"], "content": [_part(part) for part in _parts(turn["content"])]} for turn in conversation
    ]


def _pictures(conversation: Conversation) -> list[Image.Image]:
    """In the order of their marks."""
    parts = [part for turn in conversation for part in _parts(turn["content"]) if part["type"] == "image_url"]
    return [Image.fromarray(codec.image_from_base64(part["image_url"]["url"])) for part in parts]


def _parts(content: str | Sequence[Any]) -> Sequence[Any]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _part(part: Any) -> dict[str, Any]:
    return _PICTURE if part["type"] == "image_url" else dict(part)
