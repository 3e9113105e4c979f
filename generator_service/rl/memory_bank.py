"""The memory bank: reference features of the real images, by identity (RL-identity 4.1).

Knows nothing of how features are made, nor of the rewards that compare with them.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch

from generator_service.real_images import RealImages
from generator_service.rl.features import Extractor
from generator_service.rl.rewards import Bank
from protocol.errors import UnknownClass


def build(
    extractor: Extractor, real: RealImages, batch: int, classes: Sequence[str] | None = None
) -> Generator[int, None, Bank]:
    """Features [M, D] of all M real images, in their order. An identity may have one image.

    Args:
        batch: images between two yields, so that the engine can serve others.
        classes: label -> name; None: as many as the labels say, which then name them.

    Yields:
        Images done.

    Raises:
        UnknownClass: a class has no image.
        GenerationFailed: see `Extractor`.
    """
    counts = torch.from_numpy(real.labels).bincount(minlength=0 if classes is None else len(classes))
    if not counts.numel() or (missing := (counts == 0).nonzero().flatten().tolist()):
        names = [repr(label if classes is None else classes[label]) for label in missing[:5]] if counts.numel() else []
        raise UnknownClass(
            f"there is no real image of {', '.join(names) or 'any class'}: rewards compare with them, so give each "
            "class one at least, or leave it out of the dataset",
            param="rewards",
        )
    found = []
    for start in range(0, len(real.labels), batch):
        found.append(extractor(real.images[start : start + batch]))
        yield min(start + batch, len(real.labels))
    return Bank(torch.cat(found), torch.from_numpy(real.labels))
