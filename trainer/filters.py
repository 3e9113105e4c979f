"""How well synthetic samples fit the real ones, by the filter that the settings turn on: a run's model and data for the
numerics of `selection`. Does not know how many are dropped.

Every filter's score is the lower, the worse a sample fits. Shapes: N samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from trainer.data.images import SyntheticImages
from trainer.run import Run
from trainer.selection import similarity, vog


def scores(run: Run, data: SyntheticImages) -> Tensor:
    """Score [N] of each sample, on the CPU; NaN where no filter is on. Every process of the run takes part."""
    kind = run.config.filter
    if kind is None or not len(data):
        return torch.full((len(data),), math.nan)
    with run.journal.timed(kind, iteration=run.at.iteration):
        return FILTERS[kind](run, data)


def variance_of_gradients(run: Run, data: SyntheticImages) -> Tensor:
    """GenDataAgent eqs. 4-6, over the checkpoints of the warm-up."""
    part, most = run.processes.part(len(data)), max(1, vog.BATCH // run.frame.pictures)
    spread, logit, own = run.config.vog.spread, run.task.true_logit, [torch.empty(0)]
    for rows in torch.arange(part.start, part.stop).split(most):
        x, y = run.inputs(data.images[rows]), data.labels[rows].to(run.device)
        own.append(vog.vog(run.model, run.snapshots, x, y, logit=logit, spread=spread, batch_size=most).cpu())
    return run.processes.gather(torch.cat(own), len(data))


def nearest_neighbours(run: Run, data: SyntheticImages) -> Tensor:
    """Similarity to the nearest real samples, in the features of the model as it is now (Li et al. 2023a)."""
    return similarity.to_targets(run.features(data), run.features(run.real), run.config.similarity.neighbours)


FILTERS: dict[str, Callable[[Run, SyntheticImages], Tensor]] = {
    "vog": variance_of_gradients,
    "similarity": nearest_neighbours,
}
