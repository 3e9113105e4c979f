"""The numbers of one iteration: one line of metrics.jsonl; and, with the last, what is measured once a run.

Knows a run; not where the line goes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from protocol.errors import ConfigError
from trainer import record
from trainer.data.batches import derive
from trainer.data.images import RealImages, SyntheticImages, read
from trainer.evaluate import Evaluation, evaluate, gradient_magnitude, train_val_gap
from trainer.metrics import features
from trainer.metrics.corruptions import Corrupted, scale_for
from trainer.run import Run
from trainer.video_quality.assessment import assess
from trainer.video_quality.clip_set import ClipSet
from trainer.video_quality.subject import trained_on

log = logging.getLogger("trainer")

GRADIENTS = 8  # rows whose gradients are held at once, where they are images
ERASED_CLASSES = 10  # that RL-identity's Figure 4 shows

COUNTS = (
    "candidates",  # samples handed to this iteration
    "near_copies",  # of them, dropped as near copies of a real one
    "privacy_dropped",  # of the rest, dropped as too near to a real one
    "vog_dropped",  # of the rest, dropped by VoG; what remains is the synthetic training set
    "similarity_dropped",  # likewise by similarity, where that filter takes VoG's place
    "real_rows",  # rows trained on
    "synthetic_rows",  # rows trained on, after lookahead
    "lookahead_seen",  # synthetic rows that lookahead scored
)


def measure(run: Run) -> dict[str, Any]:
    """Measure the iteration that ends now; every process of the run takes part."""
    train = accuracy(run, run.real)
    row: dict[str, Any] = {
        "iteration": run.at.iteration,
        "updates": run.at.updates,
        "learning_rate": run.optimizer.param_groups[0]["lr"],
        "loss_real": run.at.mean("real_loss", "real_rows"),
        "loss_synthetic": run.at.mean("synthetic_loss", "synthetic_rows"),
        "train_top1": train.top1,
        "train_per_class": train.per_class,
        "gradient_real": gradient(run, run.real),
        "gradient_synthetic": gradient(run, run.synthetic),
        **{name: run.at.sums.get(name, 0.0) for name in COUNTS},
        "stale": run.processes.first(lambda: run.pool.stale),
        "devices": int(run.processes.totals({"devices": 1})["devices"]),
        "device": run.device.type,
    }
    if run.config.feedback.scarcity.enabled:
        row["scarce"] = run.at.scarce
    if len(run.synthetic):
        row["synthetic_top1"] = accuracy(run, run.synthetic).top1
    if run.test is not None:
        row |= run.task.evaluate(run.test, run.predict, run.features)
    if "test_top1" in row:
        row["train_val_gap"] = train_val_gap(train.top1, row["test_top1"])
    return row if run.at.iteration + 1 < run.config.iterations else row | measure_last(run)


def measure_last(run: Run) -> dict[str, Any]:
    """Measure what is measured once, at the end of a run; every process takes part. The samples in feature space go to
    a file of the run's folder, the rest is returned.

    Raises:
        DiskFull: there is no room for that file.
    """
    if run.config.measure.features_per_class:
        run.processes.first(lambda: write_features(run))
    found = run.processes.first(lambda: video_quality(run)) if run.frame.frames is not None else {}
    if not isinstance(run.test, RealImages) or not run.config.measure.corruptions:
        return found
    return found | {"corrupted": corrupted(run, run.test), "corruption_scale": corruption_scale(run)}


def video_quality(run: Run) -> dict[str, Any]:
    """Frechet distances and diversity of the synthetic clips that the run trained on, beside its own real ones of their
    classes (ARGen eqs. 27 to 33, Table 8); nothing where no network is named. In the first process."""
    settings, dataset = run.config.measure.video, run.splits.dataset
    if not settings.wanted:
        return {}
    made = ClipSet.of_candidates(run.pool.find(trained_on(run.config.folder)), dataset)
    if not len(made):
        return {}
    try:
        return assess(settings, made, ClipSet.of_dataset(dataset, set(made.texts)), run.device).measured()
    except ConfigError as error:
        again = f"python -m trainer.video_quality --made {run.config.folder}"
        log.warning("the quality of the synthetic clips is not measured: %s. `%s` does it later", error, again)
        return {}


def corruption_scale(run: Run) -> Any:
    chosen = run.config.measure.corruption_scale
    return scale_for(max(run.frame[:2])) if chosen == "auto" else chosen


def corrupted(run: Run, data: RealImages) -> dict[str, dict[int, float]]:
    """Top-1 accuracy on corrupted images (GenDataAgent Table 13): corruption -> severity -> part of one."""
    settings, scale = run.config.measure, corruption_scale(run)
    return {
        kind: {
            severity: accuracy(run, Corrupted(data, kind, severity, scale, run.config.seed, run.device)).top1
            for severity in settings.severities
        }
        for kind in settings.corruptions
    }


def write_features(run: Run) -> None:
    """Keep some real samples, and some that the filter kept and dropped in this iteration, in the model's feature space
    (GenDataAgent Figure 3), and of a few classes the real ones with a part erased (RL-identity Figure 4); nothing where
    the model does not tell its features. In the first process."""
    settings, generator = run.config.measure, torch.Generator().manual_seed(derive(run.config.seed, "features"))
    shown = features.spread(len(run.task.classes), settings.features_classes)
    found: dict[str, Tensor] = {}
    labels: dict[str, Tensor] = {}
    real = torch.empty(0, dtype=torch.long)
    try:
        for kind, data in (("real", run.real), ("kept", run.synthetic), ("dropped", dropped(run, shown))):
            eligible = torch.isin(data.labels, shown).nonzero().flatten()
            rows = eligible[features.drawn(data.labels[eligible], settings.features_per_class, generator)]
            real = rows if kind == "real" else real
            if len(rows):
                found[kind], labels[kind] = features_of(run, data, rows), data.labels[rows]
        chosen = features.some(labels.get("kept", run.real.labels[real]), ERASED_CLASSES, generator)
        rows = real[torch.isin(run.real.labels[real], chosen)]
        if len(rows):
            hide = partial(features.erased, generator=generator)
            found["erased"], labels["erased"] = features_of(run, run.real, rows, hide), run.real.labels[rows]
    except ConfigError as error:
        log.info("the samples' features are not kept: %s", error)
        return
    features.write(run.config.folder, found, labels)


def dropped(run: Run, shown: Tensor) -> SyntheticImages:
    """The samples of the classes shown that the filter dropped in this iteration."""
    wanted, rows = set(shown.tolist()), record.rows(run.config.folder / "selection.jsonl")
    ids = [row["id"] for row in rows if (row["iteration"], row["fate"]) == (run.at.iteration, run.config.filter)]
    candidates = [candidate for candidate in run.pool.find(ids) if candidate.sample.label in wanted]
    return SyntheticImages(candidates, read(candidates, run.frame))


def features_of(
    run: Run,
    data: RealImages | SyntheticImages,
    rows: Tensor,
    change: Callable[[Tensor], Tensor] = lambda images: images,
) -> Tensor:
    """Features [N, D] of some rows of a set, un-augmented but for `change`, in this process alone."""
    found = []
    for chunk in rows.split(run.evaluation_rows):
        images = torch.stack([data[row][0] for row in chunk.tolist()])
        with run.autocast():
            found.append(run.task.features(run.model, run.inputs(change(images))).float().cpu())
    return torch.cat(found)


def accuracy(run: Run, data: RealImages | SyntheticImages | Corrupted) -> Evaluation:
    """How good the model is on un-augmented rows."""
    return evaluate(run.predict(data), data.labels, len(run.task.classes))


def gradient(run: Run, data: RealImages | SyntheticImages) -> float | None:
    """Mean gradient norm of rows spread evenly over a set (GenDataAgent Figure 6b): sets are ordered by class or by
    source, so that its first rows would stand for a few. None for an empty set."""
    most = run.config.gradient_rows
    if not most or not len(data):
        return None
    rows = slice(None, None, -(-len(data) // most))
    x, y = run.inputs(data.images[rows]), data.labels[rows].to(run.device)
    return gradient_magnitude(run.task, run.model, x, y, chunk_size=max(1, GRADIENTS // run.frame.pictures))
