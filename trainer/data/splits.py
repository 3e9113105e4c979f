"""The images of one run: to train on, to learn thresholds from, and to test on. Knows nothing of the loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from protocol.dataset import Dataset
from protocol.errors import ConfigError
from trainer.data.batches import derive
from trainer.data.images import KINDS, Images, RealImages
from trainer.selection import ranking
from trainer.settings import TrainerConfig
from trainer.tasks.interface import Task


@dataclass
class Splits:
    dataset: Dataset  # the real samples that feedback is about
    real: Images | None  # to train on; None: a pool of synthetic samples will stand in for them
    held_out: RealImages | None  # real samples that thresholds are learnt from; None: they are fixed
    test: Any | None  # what the task measures the model on; None: nothing is held out


def open_splits(config: TrainerConfig, dataset: Dataset, task: Task) -> Splits:
    """Read the images of a run.

    Args:
        dataset: the real samples.

    Raises:
        ConfigError, DatasetError: the dataset is of clips and the task of images, or the reverse; no class has enough
            samples to hold one out; or as `Task.open_test`.
    """
    if len(dataset) and dataset.is_clips != (task.frame.frames is not None):
        raise ConfigError(KINDS[dataset.is_clips], param="task")
    size = task.frame
    rows, held_out = torch.ones(len(dataset), dtype=torch.bool), None
    if config.thresholds.auto:
        rows = _not_held_out(config, dataset)
        held_out = RealImages(dataset.subset((~rows).nonzero().flatten().tolist()), size, config.cache_gib)
        dataset = dataset.subset(rows.nonzero().flatten().tolist())
    real = None if config.mode == "synthetic" else RealImages(dataset, size, config.cache_gib)
    return Splits(dataset, real, held_out, task.open_test(config, dataset))


def _not_held_out(config: TrainerConfig, dataset: Dataset) -> torch.Tensor:
    """bool [N], drawn from the run's seed: of each class the floor(held_out * n_j) held out are false."""
    generator = torch.Generator().manual_seed(derive(config.seed, "held out"))
    labels = torch.tensor([entry.label for entry in dataset.samples])
    rows = ranking.keep(torch.rand(len(labels), generator=generator), labels, config.thresholds.held_out)
    if rows.all():
        raise ConfigError(
            f"thresholds.held_out = {config.thresholds.held_out:g} holds out no sample of any class: set it higher, or "
            "thresholds.auto = false",
            param="held_out",
        )
    return rows
