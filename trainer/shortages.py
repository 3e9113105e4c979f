"""The classes that a run asks for as such, beside single hard samples: its model and data for `selection.scarcity`.

Recall is that on samples that are not trained on, see `ScarcityConfig`: a model soon fits the others by heart, so that
nothing would be badly recognised. Does not know how the classes are asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from protocol.dataset import Dataset
from protocol.errors import ConfigError
from protocol.messages import ClassShortage
from trainer.metrics.recall import confusion, recalls
from trainer.run import Run
from trainer.selection import scarcity
from trainer.settings import TrainerConfig


def shortages(run: Run) -> list[ClassShortage]:
    """What the scarce classes lack now. Every process of the run takes part.

    Raises:
        ConfigError: the settings name a class that there is not.
    """
    if not run.config.feedback.scarcity.enabled:
        return []
    known, data = None, run.splits.recalled
    if data is not None:
        known = recalls(confusion(data.labels, run.predict(data).argmax(1), len(run.task.classes)))
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


def check_some(config: TrainerConfig, dataset: Dataset) -> None:
    """Raises ConfigError when nothing would ever be asked for: no samples, and no class is rare enough to be scarce."""
    if not config.feedback.enabled and not before_training(config, dataset):
        raise ConfigError(
            f"no class is less than {config.feedback.scarcity.part:.3g} of the dataset, so that nothing would be asked "
            "for: set feedback.scarcity.part higher, name its classes, or set feedback.enabled = true",
            param="feedback.scarcity",
        )


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
