"""Image classification with the built-in CNN or any timm model (GenDataAgent 3.1).

Knows nothing of the loop, of feedback or of the service.

Shapes: B rows, S input size, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from protocol.dataset import Dataset
from protocol.errors import ConfigError
from trainer.data.images import Frame, Images, RealImages
from trainer.data.test_split import open_test_split
from trainer.eval_mode import eval_mode
from trainer.evaluate import evaluate
from trainer.losses.cross_entropy import cross_entropy
from trainer.selection.vog import true_class_logit
from trainer.settings import TrainerConfig
from trainer.tasks.backbones import Backbone
from trainer.tasks.image_task import ImageConfig, ImageTask
from trainer.tasks.interface import OfEveryRow


class ClassificationConfig(ImageConfig):
    """The model and its input."""

    image_size: int = Field(default=32, ge=8, le=2048)  # S, pixels; images are resized to it, and cropped


class Classification(ImageTask):
    """The task `classification` of the registry.

    Args:
        config: the table [trainer.model].
        classes: label index -> class name.

    Raises:
        ConfigError: unknown model, or weights that do not exist.
    """

    Config: ClassVar = ClassificationConfig

    def __init__(self, config: ClassificationConfig, classes: Sequence[str]):
        super().__init__(config, classes, Frame(config.image_size, config.image_size))

    def build_model(self) -> nn.Module:
        """A new model on the CPU with one output a class.

        Raises:
            ConfigError: pretrained weights that are neither cached nor reachable, or an image_size that the model
                cannot take.
        """
        return self.build_network(len(self.classes))

    def backbone(self, model: nn.Module) -> Backbone:
        """The model without its head; see `Task.backbone`."""
        return self.published(model)

    def losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Cross entropy [B] of logits [B, C]."""
        return cross_entropy(outputs, y, label_smoothing=self.config.label_smoothing)

    def predict(self, model: nn.Module, x: Tensor) -> Tensor:
        """Logits [B, C] in eval mode, without gradients; the model's mode is restored."""
        with eval_mode(model), torch.no_grad():
            return model(x)

    def features(self, model: nn.Module, x: Tensor) -> Tensor:
        """What the last linear layer sees [B, D], in eval mode, as timm's models and small_cnn tell it."""
        if not hasattr(model, "forward_head"):
            raise ConfigError(
                "similarity needs a model that tells its features as timm's do, by forward_features(x) and "
                "forward_head(features, pre_logits=True): add these two, or use another criterion and filter",
                param="model",
            )
        with eval_mode(model), torch.no_grad():
            return model.forward_head(model.forward_features(x), pre_logits=True).flatten(1)

    def true_logit(self, outputs: Tensor, y: Tensor) -> Tensor:
        """The true class's logit [B], GenDataAgent eq. 4."""
        return true_class_logit(outputs, y)

    def open_test(self, config: TrainerConfig, dataset: Dataset) -> RealImages | None:
        """The split `test_split` of the same dataset; None: the settings name none.

        Raises:
            DatasetError: there is no such split.
        """
        return open_test_split(config, dataset, self.frame)

    def evaluate(self, test: Images, predict: OfEveryRow, features: OfEveryRow) -> dict[str, Any]:
        """Top-1 accuracy, and how it differs between classes."""
        found = evaluate(predict(test), test.labels, len(self.classes))
        return {
            "headline": "test_top1",
            "test_top1": found.top1,
            "worst_case_disparity": found.worst_case_disparity,
            "per_class": found.per_class,
        }
