"""Cross entropy of each row. Knows nothing of models or of where the rows come from."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, y: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Loss [B] in nats, in float32 at least, against (1 - s) * onehot(y) + s / C.

    Args:
        logits: [B, C]. y: [B], int64. label_smoothing: s in [0, 1]; 0 is plain cross entropy.
    """
    if logits.dtype.itemsize < 4:
        logits = logits.float()
    return F.cross_entropy(logits, y, reduction="none", label_smoothing=label_smoothing)
