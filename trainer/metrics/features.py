"""Where real, kept and dropped synthetic samples lie in a model's feature space (GenDataAgent Figure 3), and where real
ones of which a part is erased (RL-identity Figure 4), compactly.

Knows tensors; neither the model that made them nor how they are drawn. Shapes: N samples, D features, K components.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from protocol import codec
from trainer.durable import write_durably
from trainer.metrics.feature_file import FILE, KINDS
from trainer.tasks.augmentation import random_erasing

COMPONENTS = 50  # K at most: t-SNE of more takes longer and shows the same


def drawn(labels: Tensor, each: int, generator: torch.Generator) -> Tensor:
    """Indices, ascending, of up to `each` rows of every class, at random.

    Args:
        labels: [N], int64.
    """
    order = torch.randperm(len(labels), generator=generator)
    rows = [order[labels[order] == label][:each] for label in labels.unique()]
    return torch.cat([order[:0], *rows]).sort().values


def spread(classes: int, most: int) -> Tensor:
    """At most `most` of the labels 0 to classes - 1, evenly spread."""
    return torch.linspace(0, classes - 1, min(classes, most)).round().long()


def some(labels: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """At most `most` of the distinct labels, ascending, at random."""
    distinct = labels.unique()
    return distinct[torch.randperm(len(distinct), generator=generator)[:most]].sort().values


def erased(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images uint8 [N, H, W, 3] or clips [N, M, H, W, 3], each with a rectangle of random colours (Random Erasing,
    Zhong et al. 2020)."""
    x, zero, one = images.movedim(-1, -3).float() / 255, torch.zeros(3), torch.ones(3)
    noisy = random_erasing(x, generator, len(x), slice(0, len(x)), probability=1.0, mean=zero, std=one)
    return (255 * noisy).round().to(torch.uint8).movedim(-3, -1)


def principal_components(features: Tensor, most: int = COMPONENTS) -> Tensor:
    """[N, K]: the centred features [N, D] along their directions of largest variance, largest first."""
    centred = features.double() - features.double().mean(0)
    vectors = torch.linalg.eigh(centred.T @ centred).eigenvectors
    return (centred @ vectors.flip(1)[:, :most]).float()


def write(folder: Path, features: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> None:
    """Write the samples' principal components, labels and kinds into a run's folder.

    Args:
        features: kind, one of KINDS -> [N, D]. labels: kind -> [N].

    Raises:
        DiskFull: the file is as it was.
    """
    kinds = [kind for kind in KINDS if kind in features]
    components = principal_components(torch.cat([features[kind] for kind in kinds]))
    arrays = {
        "components": components.numpy(),
        "labels": torch.cat([labels[kind] for kind in kinds]).numpy(),
        "kinds": np.concatenate([np.full(len(labels[kind]), KINDS.index(kind), dtype=np.uint8) for kind in kinds]),
    }
    write_durably(folder / FILE, codec.encode(arrays))
