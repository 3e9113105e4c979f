"""What differs between training tasks: classification, re-identification, retrieval, video.

The loop, feedback, VoG, lookahead and evaluation call a task through this protocol and know nothing else of it. A task
knows nothing of them, of the service, or of where samples come from.

Shapes: B rows, H, W the model's input size, C classes, N pictures of a set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from protocol.dataset import Dataset
from trainer.data.images import Frame, Images
from trainer.settings import TrainerConfig
from trainer.tasks.backbones import Backbone

Outputs = Tensor | tuple[Tensor, Tensor]  # of a model: logits [B, C], or features [B, D] and logits
OfEveryRow = Callable[[Images], Tensor]  # logits [N, C] or features [N, D] of a set's pictures, un-augmented


@runtime_checkable
class Task(Protocol):
    """Built as `SomeTask(SomeTask.Config(...), classes)`; register it in `trainer.registry`, kind "task"."""

    Config: ClassVar[type[BaseModel]]  # the table [trainer.model] of the settings
    classes: Sequence[str]  # label index -> class name
    frame: Frame  # the size H, W that every image is brought to

    def build_model(self) -> nn.Module:
        """A new model on the CPU; random weights come from torch's global generator."""

    def preprocess(self, images: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] to normalised float32 [B, 3, H, W], on the same device."""

    def augment(self, x: Tensor, generator: torch.Generator, first: int = 0, total: int | None = None) -> Tensor:
        """Training augmentation of preprocessed rows; all randomness comes from the generator.

        Args:
            x: rows first, first + 1, ... of a batch of `total` rows (None: all of it). Each becomes what it becomes
                when the batch is augmented whole.
        """

    def losses(self, outputs: Outputs, y: Tensor) -> Tensor:
        """Loss [B] of each row from the model's outputs and the labels [B]; rows may depend on each other."""

    def predict(self, model: nn.Module, x: Tensor) -> Tensor:
        """Logits [B, C] in eval mode, without gradients; the model's mode is restored."""

    def features(self, model: nn.Module, x: Tensor) -> Tensor:
        """What the model's last layer sees [B, D], which is what identities are compared by; in eval mode, without
        gradients; the model's mode is restored.

        Raises:
            ConfigError: the model does not tell.
        """

    def true_logit(self, outputs: Outputs, y: Tensor) -> Tensor:
        """The value [B] whose input gradient VoG takes."""

    def backbone(self, model: nn.Module) -> Backbone:
        """The model's trained weights without head and neck, for others to build it from.

        Raises:
            ConfigError: it is none of timm's models.
        """

    def open_test(self, config: TrainerConfig, dataset: Dataset) -> Any | None:
        """What the model is to be measured on, which only `evaluate` knows more of; None: nothing is held out.

        Args:
            dataset: the real samples to train on.

        Raises:
            ConfigError, DatasetError: what the settings name is not there.
        """

    def evaluate(self, test: Any, predict: OfEveryRow, features: OfEveryRow) -> dict[str, Any]:
        """How good the model is, by what `open_test` opened: fields of a line of metrics.jsonl. `headline` names the
        main one, a part of one of which more is better.

        Args:
            predict, features: of the model as it is now; every process of the run takes part in a call.
        """
