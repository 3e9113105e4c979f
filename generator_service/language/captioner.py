"""A model that describes pictures, from transformers: BLIP-2, BLIP, GIT, a vision encoder with a text decoder, ...

Knows nothing of datasets, nor of what captions are for.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, ProcessorMixin

from generator_service.language.pretrained import PretrainedConfig
from protocol.errors import ConfigError


class Config(PretrainedConfig):
    """Settings of the captioner. The paper's is BLIP-2, "Salesforce/blip2-opt-2.7b"."""

    prompt: str | None = None  # that the caption goes on from, such as "a photo of"; it is left out of the caption
    max_new_tokens: int = Field(default=30, ge=1)  # of a caption
    beams: int = Field(default=1, ge=1, le=64)  # 1: the likeliest token each time; more: better captions, slower


class Captioner:
    """Describes pictures, `batch_size` at a time."""

    def __init__(self, config: Config):
        """Loads the model. Raises ConfigError when it cannot be found, or describes no pictures."""
        self.name = config.model
        self._config, self._device = config, config.place()
        processor = config.open(AutoProcessor.from_pretrained)
        self._processor = processor if isinstance(processor, ProcessorMixin) else None
        if self._processor is not None:
            self._images, self._tokenizer = processor.image_processor, processor.tokenizer
        elif config.prompt is not None:
            raise ConfigError(f"{config.model!r} takes no prompt: leave `prompt` out, or name another captioner")
        else:
            self._images = config.open(AutoImageProcessor.from_pretrained)
            self._tokenizer = config.open(AutoTokenizer.from_pretrained)
        model = config.open(AutoModelForImageTextToText.from_pretrained, dtype=config.dtype, use_safetensors=True)
        self._model = model.to(self._device).eval()
        self._lock = threading.Lock()

    def describe(self, images: Sequence[np.ndarray]) -> list[str]:
        """A caption for each picture, on one line; "" where the model has nothing to say.

        Args:
            images: uint8 RGB [H, W, 3], of any sizes.
        """
        size = self._config.batch_size
        with self._lock:
            batches = [self._describe(images[start : start + size]) for start in range(0, len(images), size)]
        return [caption for batch in batches for caption in batch]

    @torch.inference_mode()
    def _describe(self, images: Sequence[np.ndarray]) -> list[str]:
        tokens = self._model.generate(
            **self._inputs([Image.fromarray(image) for image in images]),
            do_sample=False,
            num_beams=self._config.beams,
            max_new_tokens=self._config.max_new_tokens,
        )
        said = self._tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [self._caption(text) for text in said]

    def _inputs(self, images: list[Image.Image]) -> dict[str, Any]:
        if self._config.prompt is None:
            asked = self._images(images, return_tensors="pt")
        else:
            assert self._processor is not None
            texts = [self._config.prompt] * len(images)
            asked = self._processor(images=images, text=texts, padding=True, return_tensors="pt")
        pixels = asked.pop("pixel_values").to(self._device, self._model.dtype)
        return {"pixel_values": pixels} | {name: value.to(self._device) for name, value in asked.items()}

    def _caption(self, text: str) -> str:
        """What was said, without the prompt."""
        said, prompt = " ".join(text.split()), " ".join((self._config.prompt or "").split())
        if said.casefold().startswith(prompt.casefold()):
            said = said[len(prompt) :]
        return said.strip(" .,;:")
