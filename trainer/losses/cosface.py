"""Large margin cosine loss of each row (CosFace, Wang et al. 2018). Knows nothing of models.

Shapes: B rows, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.losses.cross_entropy import cross_entropy


def cosface(cosines: Tensor, y: Tensor, *, scale: float = 64.0, margin: float = 0.35) -> Tensor:
    """Loss [B] in nats: cross entropy of s * (cos - m * onehot(y)), their eq. 4, in float32 at least.

    Args:
        cosines: [B, C] of an embedding with each class's weight, in [-1, 1]. y: [B], int64.
        scale: s > 0. margin: m >= 0, in units of the cosine; 0 is the cross entropy of scaled cosines.
    """
    if cosines.dtype.itemsize < 4:
        cosines = cosines.float()
    targets = y[:, None] == torch.arange(cosines.shape[1], device=y.device)
    return cross_entropy(scale * (cosines - margin * targets), y)
