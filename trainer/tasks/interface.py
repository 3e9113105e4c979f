"""What differs between training tasks: classification, re-identification, retrieval, video.

The loop, feedback, VoG, lookahead and evaluation call a task through this protocol and know nothing else of it. A task
knows nothing of them, of the service, or of where samples come from.

Shapes: B rows, S the model's input size, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol, runtime_checkable

import torch
from pydantic import BaseModel
from torch import Tensor, nn


@runtime_checkable
class Task(Protocol):
    """Built as `SomeTask(SomeTask.Config(...), classes)`; register it in `trainer.registry`, kind "task"."""

    Config: ClassVar[type[BaseModel]]  # the table [trainer.model] of the settings
    classes: Sequence[str]  # label index -> class name

    def build_model(self) -> nn.Module:
        """A new model on the CPU; random weights come from torch's global generator."""

    def preprocess(self, images: Tensor) -> Tensor:
        """uint8 [B, S, S, 3] to normalised float32 [B, 3, S, S], on the same device."""

    def augment(self, x: Tensor, generator: torch.Generator, first: int = 0, total: int | None = None) -> Tensor:
        """Training augmentation of preprocessed rows; all randomness comes from the generator.

        Args:
            x: rows first, first + 1, ... of a batch of `total` rows (None: all of it). Each becomes what it becomes
                when the batch is augmented whole.
        """

    def losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Loss [B] of each row from the model's outputs and the labels [B]; rows may depend on each other."""

    def predict(self, model: nn.Module, x: Tensor) -> Tensor:
        """Logits [B, C] in eval mode, without gradients; the model's mode is restored."""

    def features(self, model: nn.Module, x: Tensor) -> Tensor:
        """What the model's last layer sees [B, D], in eval mode, without gradients; the model's mode is restored.

        Raises:
            ConfigError: the model does not tell.
        """

    def true_logit(self, outputs: Tensor, y: Tensor) -> Tensor:
        """The value [B] whose input gradient VoG takes."""
