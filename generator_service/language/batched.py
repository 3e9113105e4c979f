"""Questions answered a batch at a time, in smaller ones where memory is short. Knows nothing of models."""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from agent.language import Conversation
from protocol.errors import LanguageUnavailable

log = logging.getLogger(__name__)


class Batched(ABC):
    """A `agent.language.ChatModel` of what answers one batch."""

    def __init__(self, name: str, batch_size: int):
        self.name = name
        self._batch_size = batch_size  # less where memory did not last
        self._lock = threading.Lock()
        self._closed = False

    @abstractmethod
    def _answer(self, conversations: Sequence[Conversation], seeds: Sequence[int]) -> list[str]:
        """Of one batch. May raise torch.OutOfMemoryError."""

    def complete(self, conversations: Sequence[Conversation], seeds: Sequence[int]) -> list[str | LanguageUnavailable]:
        """See `ChatModel`. Callers take turns, batch by batch."""
        answers: list[str | LanguageUnavailable] = []
        while len(answers) < len(conversations):
            with self._lock:
                if self._closed:
                    error = LanguageUnavailable(
                        f"language model {self.name!r} is not asked any more: the service stops"
                    )
                    return answers + [error] * (len(conversations) - len(answers))
                part = slice(len(answers), len(answers) + self._batch_size)
                answers += self._within_memory(conversations[part], seeds[part])
        return answers

    def close(self) -> None:
        """See `ChatModel`; a batch that runs is finished."""
        self._closed = True

    def _within_memory(
        self, conversations: Sequence[Conversation], seeds: Sequence[int]
    ) -> Sequence[str | LanguageUnavailable]:
        """The answers to one batch; none when it is to be asked again in smaller ones."""
        try:
            return self._answer(conversations, seeds)
        except torch.OutOfMemoryError:
            told = f"language model {self.name!r} has not enough memory"
        if len(conversations) == 1:
            return [LanguageUnavailable(f"{told} for one question: use a smaller model, dtype or max_new_tokens")]
        self._batch_size = len(conversations) // 2
        log.warning("%s for %d questions at a time: goes on with %d", told, len(conversations), self._batch_size)
        return []
