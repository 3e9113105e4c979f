"""Augmentations of each row on its own, whose draws do not depend on which rows are held. Knows nothing of tasks.

Shapes: B rows of a batch, b of them held here, H, W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

AREA = (0.02, 0.4)  # of the erased rectangle, as a part of the image
ASPECT = (0.3, 1 / 0.3)  # its height over its width
TRIES = 10  # of a rectangle that fits; past them the image stays whole


def moved(x: Tensor, generator: torch.Generator, drawn: int, own: slice, *, shift: int, flip: bool) -> Tensor:
    """Rows shifted by up to `shift` pixels in each direction, edges repeated, and mirrored half of the time, by one
    gather.

    Args:
        x: [b, C, H, W], or clips [b, M, C, H, W], whose frames all move alike. drawn: B. own: which of them x holds.
    """
    if x.ndim == 5:
        return moved(x.flatten(1, 2), generator, drawn, own, shift=shift, flip=flip).view(x.shape)
    batch, channels, height, width = x.shape
    offsets = torch.randint(-shift, shift + 1, (2, drawn, 1), generator=generator, device=generator.device)
    dy, dx = offsets[:, own].to(x.device)
    rows = (torch.arange(height, device=x.device) + dy).clamp(0, height - 1)
    columns = (torch.arange(width, device=x.device) + dx).clamp(0, width - 1)
    if flip:
        mirrored = torch.rand((drawn, 1), generator=generator, device=generator.device)[own] < 0.5
        columns = torch.where(mirrored.to(x.device), columns.flip(1), columns)
    index = torch.arange(batch, device=x.device)[:, None, None, None]
    channel = torch.arange(channels, device=x.device)[:, None, None]
    return x[index, channel, rows[:, None, :, None], columns[:, None, None, :]]


def random_erasing(
    x: Tensor, generator: torch.Generator, drawn: int, own: slice, *, probability: float, mean: Tensor, std: Tensor
) -> Tensor:
    """Rows of which a rectangle is random noise, with that probability (Random Erasing, Zhong et al. 2020).

    Args:
        x: [b, 3, H, W], normalised by mean and std [3]; the noise is of uniform colours, normalised likewise. Of clips
            [b, M, 3, H, W] every frame gets the same.
        drawn: B. own: which of them x holds.
    """
    seeds = torch.randint(2**62, (drawn,), generator=generator, device=generator.device)[own]
    erased, (height, width) = x.clone(), x.shape[-2:]
    for row, seed in enumerate(seeds.tolist()):
        draw = torch.Generator().manual_seed(seed)
        if torch.rand((), generator=draw) >= probability:
            continue
        area, aspect, top, left = torch.rand(4, TRIES, generator=draw)
        area = (AREA[0] + (AREA[1] - AREA[0]) * area) * height * width
        aspect = ASPECT[0] + (ASPECT[1] - ASPECT[0]) * aspect
        h, w = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
        fits = ((h > 0) & (w > 0) & (h <= height) & (w <= width)).nonzero().flatten().tolist()
        for at in fits[:1]:
            size = int(h[at]), int(w[at])
            y0, x0 = int(top[at] * (height - size[0] + 1)), int(left[at] * (width - size[1] + 1))
            noise = torch.rand(3, *size, generator=draw)
            noise = (noise - mean[:, None, None]) / std[:, None, None]
            erased[row, ..., y0 : y0 + size[0], x0 : x0 + size[1]] = noise.to(erased)
    return erased
