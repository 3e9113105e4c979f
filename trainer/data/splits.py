"""The images of one run: to train on, to learn thresholds from, to tell scarce classes by, and to test on.

Knows nothing of the loop.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

from protocol.dataset import Dataset
from protocol.errors import ConfigError
from trainer.data.batches import derive
from trainer.data.images import KINDS, Images, RealImages
from trainer.data.test_split import open_split
from trainer.selection import ranking
from trainer.settings import TrainerConfig
from trainer.tasks.interface import Task

log = logging.getLogger("trainer")


@dataclass
class Splits:
    dataset: Dataset  # the real samples that feedback is about
    real: Images | None  # to train on; None: a pool of synthetic samples will stand in for them
    held_out: RealImages | None  # real samples that thresholds are learnt from; None: they are fixed
    recalled: RealImages | None  # that tell how well scarce classes are recognised; None: nothing does
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
    recalled = _recalled(config, dataset, task, held_out)
    return Splits(dataset, real, held_out, recalled, task.open_test(config, dataset))


def _recalled(config: TrainerConfig, dataset: Dataset, task: Task, held_out: RealImages | None) -> RealImages | None:
    """Real samples that are not trained on, and that scarcity is told by."""
    rule = config.feedback.scarcity
    if not rule.enabled or rule.classes is not None:
        return None
    if rule.split is None:
        return held_out
    if rule.split == config.test_split:
        log.warning(
            "the recall of the split %r decides which classes are scarce, so that what is trained on depends on it: "
            "what is measured on it at the end is not of unseen samples",
            rule.split,
        )
    said = f'trainer.feedback.scarcity.split = "{rule.split}"'
    return open_split(config, dataset, task.frame, rule.split, said)


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
