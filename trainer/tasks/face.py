"""Face recognition: a large margin cosine loss over the training identities (CosFace; RL-identity 5.1), measured by
telling pairs of the same person from pairs of two.

Knows nothing of the loop, of feedback or of the service.

Shapes: B rows, D embedding, C training identities, P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator
from torch import Tensor, nn

from protocol.dataset import Dataset
from trainer.data.images import Frame, RealImages
from trainer.data.pair_sets import Pairs, PairsConfig, open_pairs
from trainer.losses.cosface import cosface
from trainer.metrics.verification import Verification, similarity, verify
from trainer.settings import TrainerConfig
from trainer.tasks.identity import CosineHead, EmbeddingNetwork, IdentityConfig, IdentityTask, Mirrored, Outputs, Side
from trainer.tasks.interface import OfEveryRow

Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class FaceConfig(IdentityConfig):
    """The model, its loss, and what it is measured on."""

    model: str = "resnet50"
    image_size: tuple[Side, Side] = (112, 112)
    embedding: int | None = Field(default=512, ge=2)  # D: a linear layer and batch normalisation make it of the
    # backbone's features; None: the features themselves, normalised likewise
    scale: Positive = 64.0  # s of the loss
    margin: Annotated[float, Field(ge=0.0, le=1.0)] = 0.35  # m of the loss, a cosine; only while training
    flip_test: bool = False  # measure with the sum of an image's embedding and its mirror image's
    pairs: list[PairsConfig] = []  # sets that the model is measured on; []: nothing is measured

    @model_validator(mode="after")
    def _scored_as_logits(self) -> FaceConfig:
        if self.label_smoothing:
            raise ValueError("CosFace has no label smoothing: leave label_smoothing out")
        return self


@dataclass(frozen=True)
class _Set:
    """One set of pairs."""

    images: RealImages
    pairs: Pairs


class Face(IdentityTask):
    """The task `face` of the registry; arguments and errors as `ImageTask`."""

    Config: ClassVar = FaceConfig

    def __init__(self, config: FaceConfig, classes: Sequence[str]):
        super().__init__(config, classes, Frame(*config.image_size, crop=False))

    def build_model(self) -> nn.Module:
        """A new model on the CPU, whose logits are cosines without scale and margin: these belong to the loss.

        Raises:
            ConfigError: pretrained weights that are neither cached nor reachable, or an image_size that the model
                cannot take.
        """
        backbone = self.build_network(0)
        found, wanted = self.width(backbone), self.config.embedding
        size = wanted or found
        linear = [nn.Linear(found, size, bias=False)] if wanted else []
        return EmbeddingNetwork(
            backbone, nn.Sequential(*linear, nn.BatchNorm1d(size)), CosineHead(size, len(self.classes))
        )

    def losses(self, outputs: Outputs, y: Tensor) -> Tensor:
        """CosFace [B] of features and cosines [B, C]."""
        return cosface(outputs[1], y, scale=self.config.scale, margin=self.config.margin)

    def logits(self, outputs: Outputs) -> Tensor:
        """Scaled cosines [B, C], without the margin."""
        return self.config.scale * outputs[1]

    def open_test(self, config: TrainerConfig, dataset: Dataset) -> list[_Set] | None:
        """The sets of pairs; None: the settings name none. Errors as `open_pairs`."""
        opened = [open_pairs(pairs) for pairs in self.config.pairs]
        sets = [_Set(RealImages(pairs.dataset, self.frame, config.cache_gib), pairs) for pairs in opened]
        return sets or None

    def evaluate(self, test: list[_Set], predict: OfEveryRow, features: OfEveryRow) -> dict[str, Any]:
        """Accuracy of verification on each set, and the mean over the sets; those of one group each (such as RFW's
        ethnicities) are a bias table of their own, and count for the mean only where there are no others."""
        found = [(one.pairs, self._verified(one, features)) for one in test]
        plain = [result.accuracy for pairs, result in found if pairs.group is None]
        groups = {pairs.group: result.accuracy for pairs, result in found if pairs.group is not None}
        row: dict[str, Any] = {
            "headline": "verification",
            "verification": mean(plain or groups.values()),
            "verification_sets": {
                pairs.name: {"accuracy": result.accuracy, "deviation": result.deviation} for pairs, result in found
            },
        }
        if groups:
            row |= {
                "verification_groups": groups,
                "group_average": mean(groups.values()),
                "group_worst": min(groups, key=groups.__getitem__),
                "group_best": max(groups, key=groups.__getitem__),
                "group_gap": max(groups.values()) - min(groups.values()),
            }
        return row

    def _verified(self, one: _Set, features: OfEveryRow) -> Verification:
        embeddings = features(one.images)
        if self.config.flip_test:
            embeddings = embeddings + features(Mirrored(one.images))
        first, second = embeddings[one.pairs.first], embeddings[one.pairs.second]
        return verify(similarity(first, second, self.config.distance), one.pairs.same, one.pairs.fold)
