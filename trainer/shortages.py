"""The classes that a run asks for as such, beside single hard samples: its model and data for `selection.scarcity`.

Recall is that on the held-out samples that thresholds are learnt from, where there are any, and on the training samples
otherwise: the test split has no say in what is trained on. Does not know how they are asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import Tensor

from protocol.dataset import Dataset
from protocol.errors import ConfigError
from protocol.messages import ClassShortage
from trainer.metrics.recall import confusion, recalls
from trainer.run import Run
from trainer.selection import scarcity
from trainer.settings import TrainerConfig


def shortages(run: Run, logits: Tensor | None) -> list[ClassShortage]:
    """What the scarce classes lack now. Every process of the run takes part.

    Args:
        logits: [N, C] of the real samples, if they are known.

    Raises:
        ConfigError: the settings name a class that there is not.
    """
    if not run.config.feedback.scarcity.enabled:
        return []
    data, held_out = run.real, run.splits.held_out
    if run.config.feedback.scarcity.classes is None and (held_out is not None or logits is None):
        data = data if held_out is None else held_out
        logits = run.predict(data)
    known = None
    if run.config.feedback.scarcity.classes is None:
        known = recalls(confusion(data.labels, logits.argmax(1), len(run.task.classes)))
    counts = run.real.labels.bincount(minlength=len(run.task.classes)).tolist()
    return _asked(run.config, run.task.classes, known, counts)


def before_training(config: TrainerConfig, dataset: Dataset) -> list[ClassShortage]:
    """What the scarce classes lack while there is no model yet, so that rarity alone decides: for a pool.

    Raises:
        ConfigError: as `shortages`.
    """
    if not config.feedback.scarcity.enabled:
        return []
    found = Counter(entry.label for entry in dataset.samples)
    return _asked(config, dataset.classes, None, [found[label] for label in range(len(dataset.classes))])


def _asked(
    config: TrainerConfig, classes: Sequence[str], known: Sequence[float | None] | None, counts: Sequence[int]
) -> list[ClassShortage]:
    rule = config.feedback.scarcity
    if rule.classes is not None:
        if unknown := [name for name in rule.classes if name not in classes]:
            raise ConfigError(
                f"feedback.scarcity.classes names {', '.join(map(repr, unknown))}, and the dataset has "
                f"{', '.join(classes)}: correct it",
                param="feedback.scarcity.classes",
            )
        labels = [classes.index(name) for name in rule.classes]
    else:
        labels = scarcity.scarce(known or [None] * len(classes), counts, recall=rule.recall, part=rule.part)
    if not labels:
        return []
    rounds = 1 if config.mode == "offline" else config.iterations - config.warmup_iterations
    each = rule.clips or scarcity.share(rule.total, max(rounds, 1), len(labels))
    return [ClassShortage(label=label, class_name=classes[label], images=each) for label in labels]
