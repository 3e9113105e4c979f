"""Which synthetic samples of an iteration come too near to a real one to be trained on: a run's model and data for
`distances`. Does not know what becomes of them.

Shapes: N samples, M real ones, C classes, D values of a vector.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from protocol.errors import ConfigError
from trainer.data.images import Frame, Images, SyntheticImages, resized
from trainer.privacy import distances, spaces
from trainer.run import Run


def too_near(run: Run, data: SyntheticImages) -> Tensor:
    """bool [N], on the CPU: no further from a real sample of their class than its real samples' nearest neighbours
    seldom are. Every process of the run takes part.

    Raises:
        ConfigError: no class has two real samples.
    """
    if not run.config.privacy.filter or not len(data):
        return torch.zeros(len(data), dtype=torch.bool)
    with run.journal.timed("privacy", iteration=run.at.iteration):
        # those that thresholds are learnt from are kept from the model, not from the generator
        real = [images for images in (run.splits.real, run.splits.held_out) if images is not None]
        labels = torch.cat([images.labels for images in real])
        with run.processes.together():
            if labels.bincount().max() < 2:
                raise ConfigError(
                    "privacy.filter goes by how near real samples of a class are to each other, and no class has two: "
                    "add some, or set privacy.filter = false",
                    param="privacy.filter",
                )
        vectors = VECTORS[run.config.privacy.distance]
        targets = torch.cat([vectors(run, images) for images in real])
        if run.near is None or run.config.privacy.distance == "features":  # which change while the model learns
            apart = _nearest(run, targets, labels, targets, labels, others=False)
            run.near = distances.limits(apart, labels, len(run.task.classes), run.config.privacy.quantile)
        return _nearest(run, vectors(run, data), data.labels, targets, labels) <= run.near[data.labels]


def _nearest(run: Run, rows: Tensor, of: Tensor, targets: Tensor, labels: Tensor, others: bool = True) -> Tensor:
    """Distance [N] of rows [N, D] to the nearest target [M, D] with their label; not others: they are the targets, and
    none is compared with itself."""
    part = run.processes.part(len(rows))
    own = None if others else torch.arange(len(rows))[part]
    found = distances.nearest(rows[part], targets, labels=(of[part], labels), own=own)
    return run.processes.gather(found.distance, len(rows))


def _pixels(run: Run, data: Images) -> Tensor:
    """uint8 [N, D], at the size that near copies are looked for with."""
    own = run.splits.real.frame
    frame = spaces.small(own)
    images = data.images[:] if frame[:2] == own[:2] else _smaller(data, frame)
    return images.flatten(1)


def _smaller(data: Images, frame: Frame) -> Tensor:
    return torch.stack([resized(data.images[row].numpy(), frame) for row in range(len(data))])


def _features(run: Run, data: Images) -> Tensor:
    """[N, D], of length 1."""
    return F.normalize(run.features(data), dim=1)


VECTORS: dict[str, Callable[[Run, Images], Tensor]] = {"pixels": _pixels, "features": _features}
