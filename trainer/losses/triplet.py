"""Batch-hard triplet loss of each row (Hermans et al. 2017). Knows nothing of models or of where the rows come from.

Shapes: B rows, D embedding.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Margin = float | Literal["soft"]


def batch_hard_triplet(embeddings: Tensor, y: Tensor, *, margin: Margin = 0.3) -> Tensor:
    """Loss [B]: how much nearer than `margin` the nearest row of another identity is to a row than the farthest one of
    its own, by Euclidean distance; in float32 at least.

    A row that has no other row of its identity in the batch, or none of another identity, contributes 0.

    Args:
        embeddings: [B, D]. y: [B], int64.
        margin: of the hinge max(0, margin + d_p - d_n); "soft": log(1 + exp(d_p - d_n)), which never stops pulling.
    """
    if not len(embeddings):
        return embeddings.sum(1)
    if embeddings.dtype.itemsize < 4:
        embeddings = embeddings.float()
    squared = _squared_distances(embeddings.detach())  # mined without gradients; the two distances chosen are exact
    same = y[:, None] == y[None, :]
    others = same & ~torch.eye(len(y), dtype=torch.bool, device=y.device)
    farthest = squared.masked_fill(~others, -torch.inf).argmax(1)
    nearest = squared.masked_fill(same, torch.inf).argmin(1)
    gap = _distance(embeddings, embeddings[farthest]) - _distance(embeddings, embeddings[nearest])
    losses = F.softplus(gap) if margin == "soft" else F.relu(margin + gap)
    return torch.where(others.any(1) & ~same.all(1), losses, 0.0)


def _squared_distances(embeddings: Tensor) -> Tensor:
    """[B, B]; centred first, which keeps digits that the products would lose."""
    centred = embeddings - embeddings.mean(0)
    norms = centred.square().sum(1)
    return norms[:, None] + norms[None, :] - 2 * centred @ centred.T


def _distance(one: Tensor, other: Tensor) -> Tensor:
    """[B] of rows; of equal rows 0, with gradient 0."""
    return torch.linalg.vector_norm(one - other, dim=1)
