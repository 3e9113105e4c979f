"""Prompts as a Stable Diffusion UNet reads them: text embeddings, and what SDXL wants beside them.

Every prompt is encoded alone, so that its embedding is the same to the bit whatever its batch-mates, and kept for the
next time. Knows nothing of images, nor of where visual tokens come from.

    B batch, T tokens, D width of the embedding, P width of the pooled embedding
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from generator_service.backends.components import load_component
from protocol.errors import ConfigError

log = logging.getLogger(__name__)
REMEMBERED = 512  # prompts whose embeddings are kept: some 60 MB of SD 1.5's, 160 MB of SDXL's, in half precision


@dataclass(frozen=True)
class Conditions:
    """What the UNet is told of each row."""

    embeddings: torch.Tensor  # [B, T, D]
    pooled: torch.Tensor | None = None  # [B, P]; None but for SDXL
    time_ids: torch.Tensor | None = None  # [B, 6]: original size, crop corner, target size; None but for SDXL

    def __len__(self) -> int:
        return len(self.embeddings)

    def __getitem__(self, rows: slice | Sequence[int] | torch.Tensor) -> Conditions:
        """Some of the rows: a slice, indices, or a mask."""
        return Conditions(*(None if part is None else part[rows] for part in self._parts()))

    @classmethod
    def cat(cls, several: Sequence[Conditions]) -> Conditions:
        """The rows of several, one after the other."""
        columns = zip(*(conditions._parts() for conditions in several), strict=True)
        return cls(*(None if parts[0] is None else torch.cat(parts) for parts in columns))

    def to(self, device: torch.device | str) -> Conditions:
        """The same, on a device."""
        return Conditions(*(None if part is None else part.to(device) for part in self._parts()))

    def added(self) -> dict[str, torch.Tensor] | None:
        """`added_cond_kwargs` of the UNet."""
        return None if self.pooled is None else {"text_embeds": self.pooled, "time_ids": self.time_ids}

    def _parts(self) -> tuple[torch.Tensor | None, ...]:
        return self.embeddings, self.pooled, self.time_ids


class PromptEmbedding:
    """Tokenizer and text encoder of SD 1.x and 2.x, or the two of each of SDXL."""

    def __init__(self, folder: Path, index: dict, size: tuple[int, int], device: torch.device, dtype: torch.dtype):
        """
        Args:
            folder: of the checkpoint. index: its model_index.json. size: (H, W) of its images in pixels.

        Raises ConfigError and WeightsCorrupt, as `load_component` does.
        """
        self.cut = 0  # prompts so far that were too long
        self._tokenizing = threading.Lock()  # tokenizers keep the length that they pad to as state
        self._tokenizers = [_tokenizer(folder / "tokenizer")]
        self._encoders = [load_component(CLIPTextModel, folder / "text_encoder", device, dtype)]
        self._time_ids = None
        if (folder / "text_encoder_2").is_dir():
            self._tokenizers.append(_tokenizer(folder / "tokenizer_2"))
            second = load_component(CLIPTextModelWithProjection, folder / "text_encoder_2", device, dtype)
            self._encoders.append(second)
            self._time_ids = torch.tensor([[*size, 0, 0, *size]], device=device, dtype=dtype)
        self._no_prompt_is_zero = bool(index.get("force_zeros_for_empty_prompt")) and self._time_ids is not None
        self.width = sum(encoder.config.hidden_size for encoder in self._encoders)
        self._encoded = lru_cache(maxsize=REMEMBERED)(self._encode)

    def __call__(self, prompts: Sequence[str | None], visual: torch.Tensor | None = None) -> Conditions:
        """
        Args:
            prompts: None: no prompt, which is the empty one, or zeros where the checkpoint was trained so.
            visual: float32 [B, D], written over the last token position of each row; a row of NaN: none.
        """
        rows = Conditions.cat([self._encoded(prompt) for prompt in prompts])
        if visual is None:
            return rows
        given = ~visual.isnan().any(dim=1)
        embeddings = rows.embeddings.clone()
        embeddings[given, -1] = visual[given].to(embeddings)
        return replace(rows, embeddings=embeddings)

    def length(self, prompt: str) -> tuple[int, int]:
        """(tokens of a prompt, the most that are read), by the tokenizer that leaves the least room. Thread-safe."""
        return max((self._length(at, prompt) for at in range(len(self._tokenizers))), key=lambda had: had[0] - had[1])

    @torch.no_grad()
    def _encode(self, prompt: str | None) -> Conditions:
        """One prompt, as a batch of one."""
        tokens = [self._tokens(at, prompt or "") for at in range(len(self._tokenizers))]
        if self._time_ids is None:
            return Conditions(self._encoders[0](tokens[0].to(self._encoders[0].device)).last_hidden_state)
        outputs = [
            encoder(ids.to(encoder.device), output_hidden_states=True)
            for encoder, ids in zip(self._encoders, tokens, strict=True)
        ]
        embeddings = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        keep = 0.0 if prompt is None and self._no_prompt_is_zero else 1.0
        return Conditions(embeddings * keep, outputs[1].text_embeds * keep, self._time_ids)

    def _tokens(self, at: int, prompt: str) -> torch.Tensor:
        """Token ids int64 [1, T] of one tokenizer, padded, or cut as CLIP's does: the end token stays."""
        tokens, room = self._length(at, prompt)
        surplus = tokens - room
        if surplus > 0 and at == 0:
            self.cut += 1
            log.warning(
                "a prompt has %d tokens more than the text encoder reads, and they are cut: %r",
                surplus,
                prompt[:100],
                extra={"event": "prompt_cut", "tokens": surplus, "prompts": self.cut},
            )
        options = {"padding": "max_length", "max_length": room, "truncation": True, "return_tensors": "pt"}
        with self._tokenizing:
            return self._tokenizers[at](prompt, **options).input_ids

    def _length(self, at: int, prompt: str) -> tuple[int, int]:
        tokenizer = self._tokenizers[at]
        room = min(tokenizer.model_max_length, self._encoders[at].config.max_position_embeddings)
        with self._tokenizing:
            return len(tokenizer(prompt, truncation=False, verbose=False).input_ids), room


def _tokenizer(folder: Path) -> CLIPTokenizer:
    if not any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        raise ConfigError(f"{folder} holds no CLIP tokenizer: fetch or make the checkpoint again")
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} cannot be read ({error}): fetch or make the checkpoint again") from error
