"""Person re-identification: cross entropy over the training identities and a batch-hard triplet loss (RL-identity 5.1),
measured by finding queries of other people in a gallery.

Knows nothing of the loop, of feedback or of the service.

Shapes: B rows, D features, C training identities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from protocol.dataset import Dataset
from trainer.data.images import Frame, RealImages
from trainer.data.retrieval_sets import RetrievalSet, open_retrieval
from trainer.losses.cross_entropy import cross_entropy
from trainer.losses.triplet import batch_hard_triplet
from trainer.metrics.retrieval import Labelled, retrieval
from trainer.settings import TrainerConfig
from trainer.tasks.identity import EmbeddingNetwork, IdentityConfig, IdentityTask, Outputs, Side
from trainer.tasks.interface import OfEveryRow

RANKS = (1, 5, 10)  # reported beside the whole curve

Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class ReidConfig(IdentityConfig):
    """The model, its loss, and what it is measured on. Batches of P identities with K pictures each are
    trainer.images_per_identity = K with trainer.batch_size = P * K."""

    model: str = "resnet50"
    image_size: tuple[Side, Side] = (256, 128)
    neck: Literal["bnneck", "none"] = "bnneck"  # batch normalisation between features, which the triplet loss compares,
    # and embeddings, which the classifier sees and queries are compared by (Luo et al. 2019); none: both are the same
    margin: Positive | Literal["soft"] = 0.3  # of the triplet loss; "soft": softplus in the place of the hinge
    triplet_weight: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 1.0  # beside the cross entropy's 1; 0 off
    query_split: str | None = None  # parts of trainer.dataset that the model is measured on, as its layout names them;
    gallery_split: str | None = None  # None, both: nothing is measured
    camera_exclusion: bool = True  # pass over pictures of the query's identity by its own camera; false: no cameras

    @model_validator(mode="after")
    def _both(self) -> ReidConfig:
        if (self.query_split is None) != (self.gallery_split is None):
            raise ValueError("query_split and gallery_split go together: set both, or none")
        return self


@dataclass(frozen=True)
class _Side:
    """Queries or gallery."""

    images: RealImages
    known: RetrievalSet

    def labelled(self, features: OfEveryRow) -> Labelled:
        return Labelled(features(self.images), self.known.identities, self.known.cameras)


class Reid(IdentityTask):
    """The task `reid` of the registry; arguments and errors as `ImageTask`."""

    Config: ClassVar = ReidConfig

    def __init__(self, config: ReidConfig, classes: Sequence[str]):
        super().__init__(config, classes, Frame(*config.image_size, crop=False))

    def build_model(self) -> nn.Module:
        """A new model on the CPU, as Luo et al. build it: no bias in the neck, nor in a classifier after one.

        Raises:
            ConfigError: pretrained weights that are neither cached nor reachable, or an image_size that the model
                cannot take.
        """
        backbone = self.build_network(0)
        size, necked = self.width(backbone), self.config.neck == "bnneck"
        neck, head = nn.Identity(), nn.Linear(size, len(self.classes), bias=not necked)
        if necked:
            neck = nn.BatchNorm1d(size)
            neck.bias.requires_grad_(False)
            nn.init.normal_(head.weight, std=0.001)
        return EmbeddingNetwork(backbone, neck, head)

    def losses(self, outputs: Outputs, y: Tensor) -> Tensor:
        """Identity loss [B] of features [B, D] and logits [B, C]: what lookahead compares in RL-identity eq. 12.

        Hard positives and negatives are looked for among these rows: of several processes, each looks among its own.
        """
        features, logits = outputs
        losses = cross_entropy(logits, y, label_smoothing=self.config.label_smoothing)
        if self.config.triplet_weight:
            losses = losses + self.config.triplet_weight * batch_hard_triplet(features, y, margin=self.config.margin)
        return losses

    def open_test(self, config: TrainerConfig, dataset: Dataset) -> tuple[_Side, _Side] | None:
        """Queries and gallery; None: the settings name none. Errors as `open_retrieval`."""
        if self.config.query_split is None:
            return None
        query, gallery = open_retrieval(
            config.dataset,
            self.config.query_split,
            self.config.gallery_split,
            camera_exclusion=self.config.camera_exclusion,
        )
        return tuple(
            _Side(RealImages(known.dataset, self.frame, config.cache_gib), known) for known in (query, gallery)
        )

    def evaluate(self, test: tuple[_Side, _Side], predict: OfEveryRow, features: OfEveryRow) -> dict[str, Any]:
        """mAP, Rank-k and the CMC curve; pictures of a query's own camera are passed over."""
        query, gallery = (side.labelled(features) for side in test)
        found = retrieval(query, gallery, distance=self.config.distance)
        return {
            "headline": "mAP",
            "mAP": found.mean_average_precision,
            **{f"rank{k}": found.cmc[k - 1] for k in RANKS},
            "cmc": found.cmc,
            "queries": found.queries,
            "queries_without_match": found.without_match,
        }
