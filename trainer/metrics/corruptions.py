"""Common corruptions of images: Gaussian blur and speckle noise (Hendrycks & Dietterich 2019; GenDataAgent Table 13).

Knows nothing of models, nor of which severities are wanted. Shapes: B images, S pixels a side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.data.batches import derive
from trainer.data.images import RealImages

Corruption = Literal["gaussian_blur", "speckle_noise"]
Scale = Literal["imagenet-c", "cifar-c"]

# Standard deviations at severities 1 to 5: of the blur in pixels, of the noise as a part of the pixel's value.
STRENGTHS: dict[Scale, dict[Corruption, tuple[float, ...]]] = {
    "imagenet-c": {"gaussian_blur": (1.0, 2.0, 3.0, 4.0, 6.0), "speckle_noise": (0.15, 0.2, 0.35, 0.45, 0.6)},
    "cifar-c": {"gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1.0), "speckle_noise": (0.06, 0.1, 0.12, 0.16, 0.2)},
}
SMALL = 64  # pixels a side: up to here the strengths of CIFAR-C are used
REACH = 4.0  # standard deviations at which the blur's kernel ends


def scale_for(size: int) -> Scale:
    """Whose strengths suit images of `size` pixels, longer side: a blur of 6 pixels leaves nothing of one of 32."""
    return "cifar-c" if size <= SMALL else "imagenet-c"


def gaussian_blur(images: Tensor, sigma: float) -> Tensor:
    """Images convolved with a Gaussian that ends at 4 sigma, edges repeated.

    Args:
        images: uint8 [B, S, S, 3]. sigma: pixels.
    """
    reach = int(REACH * sigma + 0.5)
    offsets = torch.arange(-reach, reach + 1, device=images.device, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    x = F.pad(images.permute(0, 3, 1, 2).float(), (reach,) * 4, mode="replicate")
    x = F.conv2d(F.conv2d(x, kernel, groups=3), kernel.transpose(2, 3), groups=3)
    return _pixels(x.permute(0, 2, 3, 1))


def speckle_noise(images: Tensor, sigma: float, seeds: Sequence[int]) -> Tensor:
    """Images whose every value v became v + v n, n drawn from N(0, sigma^2).

    Args:
        images: uint8 [B, S, S, 3]. seeds: of each image's noise, which thus does not depend on its neighbours.
    """
    shape = images.shape[1:]
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    x = images.float()
    return _pixels(x + x * (sigma * noise).to(x.device))


def _pixels(x: Tensor) -> Tensor:
    return x.round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class Corrupted:
    """Images of a set, corrupted whenever they are read: indexed by slices, for `Run.predict`.

    Args:
        severity: 1 to 5. seed: of the noise, together with the row. device: where the corruption is computed.
    """

    source: RealImages
    kind: Corruption
    severity: int
    scale: Scale
    seed: int
    device: torch.device

    @property
    def images(self) -> Corrupted:
        return self

    @property
    def labels(self) -> Tensor:
        return self.source.labels

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, rows: slice) -> Tensor:
        images = self.source.images[rows].to(self.device)
        sigma = STRENGTHS[self.scale][self.kind][self.severity - 1]
        if self.kind == "gaussian_blur":
            return gaussian_blur(images, sigma)
        indices = range(*rows.indices(len(self)))
        return speckle_noise(images, sigma, [derive(self.seed, "speckle", row) for row in indices])
