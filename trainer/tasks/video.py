"""Recognition of what clips show, such as expressions of faces (ARGen 4): a network for images on each frame, and a
sequence network over them.

Knows nothing of the loop, of feedback or of the service.

Shapes: B clips, M frames, S input size, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from protocol.dataset import Dataset, DatasetConfig
from protocol.errors import ConfigError
from trainer.data.images import KINDS, Frame, Images, RealImages
from trainer.data.test_split import open_test_split
from trainer.eval_mode import eval_mode
from trainer.losses.cross_entropy import cross_entropy
from trainer.metrics import recall
from trainer.selection.vog import true_class_logit
from trainer.settings import TrainerConfig
from trainer.tasks.backbones import Backbone
from trainer.tasks.image_task import ImageConfig, ImageTask
from trainer.tasks.interface import OfEveryRow
from trainer.tasks.sequence_networks import ClipNetwork, LstmHead, TransformerHead


class VideoConfig(ImageConfig):
    """The model and its input. Augmentations change all frames of a clip alike."""

    model: str = "resnet18"  # of each frame: "small_cnn" (8 to 64 px), or a timm model: "resnet18", "vgg13", ...
    image_size: int = Field(default=224, ge=8, le=2048)  # S, pixels; frames are resized to it, and cropped
    frames: int = Field(default=16, ge=2, le=1024)  # M, evenly spread over a clip; shorter ones have repeats
    head: Literal["lstm", "transformer"] = "lstm"  # over the frames: its last state, or the mean over its frames
    layers: int = Field(default=2, ge=1, le=64)  # of the head
    hidden: int = Field(default=256, ge=1, le=8192)  # D, its dimension
    heads: int = Field(default=4, ge=1, le=64)  # of the transformer's attention; D is a multiple of it
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0  # between and in the head's layers; drop_rate comes after
    zero_shot: DatasetConfig | None = None  # another set of clips to measure on, whose classes have the same names; by
    # subject where it names them. None: test_split alone

    @model_validator(mode="after")
    def _divided(self) -> VideoConfig:
        if self.head == "transformer" and self.hidden % self.heads:
            raise ValueError(f"hidden = {self.hidden} is no multiple of heads = {self.heads}: change one of them")
        return self


@dataclass(frozen=True)
class VideoTest:
    """What the model is measured on."""

    split: RealImages | None
    zero_shot: RealImages | None


class Video(ImageTask):
    """The task `video` of the registry.

    Args:
        config: the table [trainer.model].
        classes: label index -> class name.

    Raises:
        ConfigError: unknown model, or weights that do not exist.
    """

    Config: ClassVar = VideoConfig

    def __init__(self, config: VideoConfig, classes: Sequence[str]):
        super().__init__(config, classes, Frame(config.image_size, config.image_size, frames=config.frames))

    def build_model(self) -> ClipNetwork:
        """A new model on the CPU with one output a class.

        Raises:
            ConfigError: pretrained weights that are neither cached nor reachable, or an image_size that the model
                cannot take.
        """
        config = self.config
        of_frames = self.architecture.build(0, self.frame[:2], pretrained=config.pretrained, drop_rate=0.0)
        shape = (self.width(of_frames), config.hidden, config.layers, config.dropout)
        of_sequence = (
            LstmHead(*shape) if config.head == "lstm" else TransformerHead(*shape, config.heads, config.frames)
        )
        return ClipNetwork(of_frames, of_sequence, config.hidden, len(self.classes), config.drop_rate)

    def backbone(self, model: ClipNetwork) -> Backbone:
        """The network that sees each frame; see `Task.backbone`."""
        return self.published(model.of_frames)

    def losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Cross entropy [B] of logits [B, C]."""
        return cross_entropy(outputs, y, label_smoothing=self.config.label_smoothing)

    def predict(self, model: nn.Module, x: Tensor) -> Tensor:
        """Logits [B, C] of clips [B, M, 3, S, S] in eval mode, without gradients; the model's mode is restored."""
        with eval_mode(model), torch.no_grad():
            return model(x)

    def features(self, model: nn.Module, x: Tensor) -> Tensor:
        """What the last layer sees [B, D], in eval mode."""
        with eval_mode(model), torch.no_grad():
            return model.forward_head(model.forward_features(x), pre_logits=True)

    def true_logit(self, outputs: Tensor, y: Tensor) -> Tensor:
        """The true class's logit [B], GenDataAgent eq. 4."""
        return true_class_logit(outputs, y)

    def open_test(self, config: TrainerConfig, dataset: Dataset) -> VideoTest | None:
        """The split `test_split` of the same dataset, and the clips of `zero_shot`; None: the settings name neither.

        Raises:
            ConfigError: zero_shot has pictures, or a class that is not learnt. DatasetError: it or the split is not
                there.
        """
        test = VideoTest(open_test_split(config, dataset, self.frame), self._open_zero_shot(config))
        return None if test.split is None and test.zero_shot is None else test

    def _open_zero_shot(self, config: TrainerConfig) -> RealImages | None:
        if self.config.zero_shot is None:
            return None
        other = Dataset.open(self.config.zero_shot)
        if not other.is_clips:
            raise ConfigError(f"zero_shot: {KINDS[False]}", param="zero_shot")
        if unknown := [name for name in other.classes if name not in self.classes]:
            raise ConfigError(
                f"zero_shot has the class {', '.join(map(repr, unknown))}, and the model learns "
                f"{', '.join(self.classes)}: name its classes as these, or leave some out with max_classes",
                param="zero_shot",
            )
        labels = [self.classes.index(entry.class_name) for entry in other.samples]
        return RealImages(other, self.frame, config.cache_gib, labels)

    def evaluate(self, test: VideoTest, predict: OfEveryRow, features: OfEveryRow) -> dict[str, Any]:
        """Unweighted and weighted average recall, the recall of each class, and what was taken for what."""
        found: dict[str, Any] = {"headline": "test_uar" if test.split is not None else "zero_shot_uar"}
        if test.split is not None:
            table = self._confusion(test.split, predict(test.split).argmax(1))
            per_class = recall.recalls(table)
            known = [value for value in per_class if value is not None]
            found |= {
                "test_uar": recall.uar(table),
                "test_war": recall.war(table),
                "test_top1": recall.war(table),  # by its other name
                "worst_case_disparity": min(known) / max(known) if max(known) else 0.0,
                "per_class": per_class,
                "confusion": table.tolist(),
            }
        return found if test.zero_shot is None else found | self._zero_shot(test.zero_shot, predict)

    def _zero_shot(self, other: RealImages, predict: OfEveryRow) -> dict[str, Any]:
        predicted = predict(other).argmax(1)
        table = self._confusion(other, predicted)
        subjects = recall.by_subject(other.labels, predicted, [entry.subject for entry in other.dataset.samples])
        return {
            "zero_shot_uar": recall.uar(table),
            "zero_shot_war": recall.war(table),
            "zero_shot_per_class": recall.recalls(table),
            "zero_shot_confusion": table.tolist(),
            "zero_shot_by_subject": subjects and subjects._asdict(),
        }

    def _confusion(self, data: Images, predicted: Tensor) -> Tensor:
        return recall.confusion(data.labels, predicted, len(self.classes))
