"""A chat model on this machine, from transformers: Llama 2, or any causal language model with a chat template.

Knows nothing of captions. Answers are sampled from the model's whole distribution, each conversation with noise of its
own, so that an answer does not depend on what else is in the batch.

    B batch, T tokens, V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jinja2 import TemplateError
from pydantic import Field
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList

from agent.language import Conversation, Turn
from generator_service.language.batched import Batched
from generator_service.language.pretrained import PretrainedConfig
from protocol.errors import ConfigError


class Config(PretrainedConfig):
    """Settings of the chat model."""

    temperature: float = Field(default=0.7, ge=0.0, le=2.0)  # 0: the likeliest answer; high: varied, less to the point
    max_new_tokens: int = Field(default=512, ge=1)  # of an answer; 25 versions of 10 words take about 400


class LocalChat(Batched):
    """Answers conversations, `batch_size` at a time. See `agent.language.ChatModel`."""

    def __init__(self, config: Config):
        """Loads the model. Raises ConfigError when it cannot be found, or does not chat."""
        super().__init__(config.model, config.batch_size)
        self._config, self._device = config, config.place()
        self._tokenizer = config.open(AutoTokenizer.from_pretrained, padding_side="left")
        if self._tokenizer.chat_template is None:
            raise ConfigError(
                f"{config.model!r} has no chat template: use a model that is tuned to follow instructions"
            )
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._reads_system = self._renders([{"role": "system", "content": "S0"}, {"role": "user", "content": "U0"}])
        if not self._reads_system and not self._renders([{"role": "user", "content": "U0"}]):
            raise ConfigError(f"the chat template of {config.model!r} takes no user's turn: use another model")
        model = config.open(AutoModelForCausalLM.from_pretrained, dtype=config.dtype, use_safetensors=True)
        self._model = model.to(self._device).eval()

    def _renders(self, conversation: Conversation) -> bool:
        """Whether the chat template takes such turns, and shows the model what they say."""
        try:
            text = self._tokenizer.apply_chat_template(list(conversation), tokenize=False)
        except TemplateError:
            return False
        return all(turn["content"] in text for turn in conversation)

    @torch.inference_mode()
    def _answer(self, conversations: Sequence[Conversation], seeds: Sequence[int]) -> list[str]:
        asked = self._tokenizer.apply_chat_template(
            [list(turns) if self._reads_system else _folded(turns) for turns in conversations],
            add_generation_prompt=True,
            padding=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self._device)  # int64 [B, T], padded on the left
        processors = [SeededNoise(seeds, self._config.temperature)] if self._config.temperature > 0.0 else []
        tokens = self._model.generate(
            input_ids=asked["input_ids"],
            attention_mask=asked["attention_mask"],
            do_sample=False,
            num_beams=1,
            max_new_tokens=self._config.max_new_tokens,
            logits_processor=LogitsProcessorList(processors),
            pad_token_id=self._tokenizer.pad_token_id,
        )
        return self._tokenizer.batch_decode(tokens[:, asked["input_ids"].shape[1] :], skip_special_tokens=True)


def _folded(conversation: Conversation) -> list[Turn]:
    """The same without a system's turn: the first other turn begins with what it said."""
    system = [turn["content"] for turn in conversation if turn["role"] == "system"]
    first, *others = (turn for turn in conversation if turn["role"] != "system")
    return [{"role": first["role"], "content": "\n\n".join([*system, first["content"]])}, *others]


class SeededNoise(LogitsProcessor):
    """Makes the greedy choice a sample of softmax(logits / temperature), by the Gumbel-max trick: the largest of
    logits / temperature + g with g = -log(-log(u)), u uniform. Each row has a generator of its own."""

    def __init__(self, seeds: Sequence[int], temperature: float):
        """`seeds`: [B]. `temperature`: above 0."""
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`input_ids` int64 [B, T] is not read; `scores` [B, V]; returns float32 [B, V]."""
        noise = torch.stack([torch.empty(scores.shape[1]).exponential_(generator=g) for g in self._generators])
        return scores.float() / self._temperature - noise.log().to(scores.device)
