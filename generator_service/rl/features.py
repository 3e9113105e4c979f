"""Features of images, by which generated ones are rewarded: from any timm model, or from what a trainer published.

Knows nothing of rewards. How models are built is in `backbone`, where published ones lie in `published_models`.

    N images, D features
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from generator_service.published_models import PublishedModels
from generator_service.real_images import resized
from generator_service.rl import backbone
from protocol.errors import GenerationFailed, InvalidRequest
from protocol.published import PublishedModel

ROWS = 64  # images in one forward pass
TIMM, PUBLISHED = "timm:", "published:"
SPEC = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]{0,63})(?:@(?P<version>[1-9][0-9]{0,8}))?")


@dataclass(frozen=True)
class Extractor:
    """Opened by `open_extractor`; never changes."""

    name: str  # "timm:NAME[.WEIGHTS]", or "published:NAME"
    published: PublishedModel | None  # the version that it is of; None: timm's
    digest: str  # of the weights
    dimensions: int  # D
    size: tuple[int, int]  # (height, width) of the model's input in pixels
    mean: tuple[float, float, float]  # of the channels, in [0, 1] units
    std: tuple[float, float, float]
    model: nn.Module
    device: torch.device

    @property
    def version(self) -> int | None:
        """Of a published model."""
        return None if self.published is None else self.published.version

    @property
    def exactly(self) -> str:
        """What `open_extractor` makes this very one of, again."""
        return self.name if self.published is None else f"{self.name}@{self.published.version}"

    def __call__(self, images: np.ndarray) -> Tensor:
        """Of each image, what the model's classifier would see, scaled to unit L2 norm: float32 [N, D], on the CPU.

        Args:
            images: uint8 [N, any height, any width, 3]; resized to the model's input.

        Raises:
            GenerationFailed: features of an image are all 0, or not finite.
        """
        found = torch.empty(len(images), self.dimensions)
        for start in range(0, len(images), ROWS):
            rows = np.stack([resized(image, self.size) for image in images[start : start + ROWS]])
            with torch.no_grad():
                found[start : start + ROWS] = backbone.pooled(self.model, self._inputs(rows)).float().cpu()
        norms = found.norm(dim=1, keepdim=True)
        if wrong := (~(torch.isfinite(norms) & (norms > 0.0))).flatten().nonzero().flatten().tolist():
            raise GenerationFailed(
                f"the features by {self.exactly} of {len(wrong)} of {len(images)} images are all 0 or not finite (the "
                f"first is number {wrong[0]}): their direction rewards nothing; use other features",
                param="features",
            )
        return found / norms

    def _inputs(self, images: np.ndarray) -> Tensor:
        """Normalised float32 [N, 3, H, W] of uint8 [N, H, W, 3]."""
        x = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).float() / 255
        mean, std = torch.tensor(self.mean, device=x.device), torch.tensor(self.std, device=x.device)
        return (x - mean[:, None, None]) / std[:, None, None]


def open_extractor(
    features: str, *, pretrained: bool, size: int | None, published: PublishedModels, device: torch.device | str
) -> Extractor:
    """
    Args:
        features: "timm:NAME[.WEIGHTS]"; or "published:NAME", the newest version; or "published:NAME@3".
        pretrained: timm's weights; false: random ones, always the same. Published models have their own.
        size: pixels a side; None: the model's own. Published models have their own only.

    Raises:
        InvalidRequest: features of another kind, an unknown timm model, its weights cannot be had, or a wrong size.
        UnknownWeights: no such model was published. WeightsCorrupt: it was damaged since.
    """
    device = torch.device(device)
    if features.startswith(TIMM):
        return _of_timm(features.removeprefix(TIMM), pretrained, size, device)
    parts = SPEC.fullmatch(features.removeprefix(PUBLISHED)) if features.startswith(PUBLISHED) else None
    if parts is None:
        raise InvalidRequest(
            f'features {features[:100]!r} are of no kind: write "timm:NAME", or "published:NAME"', param="features"
        )
    if size is not None:
        raise InvalidRequest("a published model has a size of its own: leave this out", param="features_size")
    version = parts["version"]
    return _of_published(published.find(parts["name"], None if version is None else int(version)), published, device)


def newer(extractor: Extractor, published: PublishedModels) -> Extractor | None:
    """Of the newest version of the same published model, on the same device; None: this is it, or timm's.

    Raises:
        UnknownWeights: it is not published any more. WeightsCorrupt: the newest version was damaged.
    """
    if extractor.published is None:
        return None
    newest = published.find(extractor.published.name)
    if newest.version <= extractor.published.version:
        return None
    return _of_published(newest, published, extractor.device)


def _of_timm(name: str, pretrained: bool, size: int | None, device: torch.device) -> Extractor:
    record = backbone.recorded(name)
    height, width = record.input_size[1:] if size is None else (size, size)
    options = {} if size is None or not record.fixed_input_size else {"img_size": size}
    dimensions = backbone.dimensions(name, options, (height, width))
    model = backbone.built(name, options, pretrained=pretrained)
    return Extractor(
        name=f"{TIMM}{name}",
        published=None,
        digest=backbone.digest(model),
        dimensions=dimensions,
        size=(height, width),
        mean=record.mean,
        std=record.std,
        model=model.to(device),
        device=device,
    )


def _of_published(model: PublishedModel, published: PublishedModels, device: torch.device) -> Extractor:
    card = model.card
    assert card is not None
    return Extractor(
        name=f"{PUBLISHED}{model.name}",
        published=model,
        digest=model.digest,
        dimensions=backbone.dimensions(card.model, backbone.plain(card.options), card.size),
        size=card.size,
        mean=card.mean,
        std=card.std,
        model=backbone.opened(card, published.content(model)).to(device),
        device=device,
    )
