"""What tasks on identities share: an embedding that tells people apart whom the model never saw, learnt by naming those
of the training set.

Shapes: B rows, H, W input size, D embedding, C training identities.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from protocol.errors import ConfigError
from trainer.data.images import Images
from trainer.eval_mode import eval_mode
from trainer.selection.vog import true_class_logit
from trainer.tasks.backbones import Backbone
from trainer.tasks.image_task import ImageConfig, ImageTask

Side = Annotated[int, Field(ge=8, le=2048)]
Outputs = tuple[Tensor, Tensor]  # features [B, D], logits [B, C]


class IdentityConfig(ImageConfig):
    """The model and its input, and how embeddings are compared."""

    image_size: tuple[Side, Side]  # H, W, pixels; images are stretched to it, so that nobody is cropped
    distance: Literal["cosine", "euclidean"] = "cosine"  # between embeddings when the model is measured


class EmbeddingNetwork(nn.Module):
    """A backbone, a neck that makes embeddings of its features, and a head that names training identities.

    `forward` returns the features before the neck and the head's logits; `embed` what identities are compared by.
    """

    def __init__(self, backbone: nn.Module, neck: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone, self.neck, self.head = backbone, neck, head

    def forward(self, x: Tensor) -> Outputs:
        """Features [B, D'] and logits [B, C] of x [B, 3, H, W]."""
        features = self.backbone(x)
        return features, self.head(self.neck(features))

    def embed(self, x: Tensor) -> Tensor:
        """Embeddings [B, D] of x [B, 3, H, W]."""
        return self.neck(self.backbone(x))


class CosineHead(nn.Module):
    """Cosines, in [-1, 1], of embeddings with a learnt direction for each class.

    Args:
        size: D. classes: C.
    """

    def __init__(self, size: int, classes: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, size))
        nn.init.normal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C] of x [B, D], in float32 under autocast too: a scale of 64 would make 0.25 of bfloat16's last digit."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(F.normalize(x.float(), dim=1), F.normalize(self.weight.float(), dim=1))


class Mirrored:
    """Images of a set, left and right exchanged when they are read: indexed by slices, for `Run.features`."""

    def __init__(self, source: Images):
        self._source, self.labels = source, source.labels

    @property
    def images(self) -> Mirrored:
        return self

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, rows: slice) -> Tensor:
        return self._source.images[rows].flip(2)


class IdentityTask(ImageTask):
    """The part of an identity task that does not depend on its loss and protocol."""

    def predict(self, model: nn.Module, x: Tensor) -> Tensor:
        """Logits [B, C] in eval mode, without gradients; the model's mode is restored."""
        with eval_mode(model), torch.no_grad():
            return self.logits(model(x))

    def features(self, model: nn.Module, x: Tensor) -> Tensor:
        """Embeddings [B, D], in eval mode, without gradients; the model's mode is restored."""
        if not hasattr(model, "embed"):
            raise ConfigError(
                "an identity task compares embeddings: give your model a method embed(x), which returns them [B, D], "
                "beside a forward that returns features and logits",
                param="model",
            )
        with eval_mode(model), torch.no_grad():
            return model.embed(x)

    def logits(self, outputs: Outputs) -> Tensor:
        """Of a model's outputs, those whose softmax tells how sure it is of an identity [B, C]."""
        return outputs[1]

    def true_logit(self, outputs: Outputs, y: Tensor) -> Tensor:
        """The true identity's logit [B], GenDataAgent eq. 4."""
        return true_class_logit(self.logits(outputs), y)

    def backbone(self, model: nn.Module) -> Backbone:
        """The model without neck and head; see `Task.backbone`."""
        if not isinstance(model, EmbeddingNetwork):
            raise ConfigError("the run's model is not its task's own, whose backbone is known by name", param="model")
        return self.published(model.backbone)
