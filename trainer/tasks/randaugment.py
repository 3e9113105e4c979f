"""RandAugment (Cubuk et al. 2020) of each image on its own, from a seed of its own: GenDataAgent's Table 6 compares
with it. Knows nothing of tasks.

Shapes: B rows, S pixels a side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def randaugment(images: Tensor, seeds: Sequence[int], *, ops: int, magnitude: int, fill: Sequence[float]) -> Tensor:
    """Each row after `ops` operations, drawn with its seed; torch's random state stays as it was.

    Args:
        images: uint8 [B, 3, S, S], or clips [B, M, 3, S, S], whose frames all change alike. seeds: B of them.
        magnitude: of each operation, 0 to 30; 9 is usual.
        fill: the colour, 0 to 255 a channel, of what an operation uncovers.

    Returns:
        uint8, shaped as the images.
    """
    from torchvision.transforms import InterpolationMode  # takes seconds to import, and few runs augment
    from torchvision.transforms.v2 import RandAugment

    draw = RandAugment(ops, magnitude, interpolation=InterpolationMode.BILINEAR, fill=list(fill))
    augmented = images.clone()
    with torch.random.fork_rng(devices=[]):
        for row, seed in enumerate(seeds):
            torch.default_generator.manual_seed(seed)
            augmented[row] = draw(images[row])
    return augmented
