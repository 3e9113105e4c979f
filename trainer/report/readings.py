"""What the paper's figures show of this run: one line each, from its numbers. Knows nothing of how they are drawn."""

from __future__ import annotations

import numpy as np

from trainer.metrics.class_counts import Relation
from trainer.metrics.device_hours import STAGES
from trainer.metrics.feature_file import KINDS, FeatureMap
from trainer.record import Record
from trainer.report.words import CORRUPTIONS, DEVICES, percent, points, signed, time_unit
from trainer.summary import Summary

CLEAR = 0.5  # correlations from here on are called so


def gap(own: Summary) -> str:
    return (
        f"At the end the model is right on {percent(own.train_top1)} of the training samples and on "
        f"{percent(own.test_top1)} of the held-out ones: a gap of {points(own.train_val_gap or 0.0).lstrip('+')}. The "
        "lower, the less it overfits."
    )


def fit(own: Summary) -> str:
    text = f"Accuracy at the end: real {percent(own.train_top1)}, synthetic {percent(own.synthetic_top1)}"
    if own.test_top1 is None or own.train_top1 is None or own.synthetic_top1 is None:
        return f"{text}."
    nearer = abs(own.synthetic_top1 - own.test_top1) < abs(own.synthetic_top1 - own.train_top1)
    like = "held-out data, as in the paper" if nearer else "training data: it has been learnt by heart"
    return f"{text}, held out {percent(own.test_top1)}. Synthetic data fits like {like}."


def gradients(record: Record) -> str:
    """In which iterations synthetic samples pulled harder on the model than real ones."""
    both = [row for row in record.metrics if row.get("gradient_synthetic") is not None and row.get("gradient_real")]
    if not both:
        return "No synthetic samples were trained on, so there is nothing to compare."
    larger = [row["iteration"] + 1 for row in both if row["gradient_synthetic"] > row["gradient_real"]]
    last = both[-1]["gradient_synthetic"] / both[-1]["gradient_real"]
    return (
        f"Synthetic gradients were the larger ones in {len(larger)} of {len(both)} iterations with synthetic samples; "
        f"in the last one they were {last:.1f} times the real ones. The larger, the more there is left to learn from."
    )


def robustness(own: Summary) -> str:
    parts = [
        f"{CORRUPTIONS[kind]} {percent(value)} ({points(value - (own.test_top1 or 0.0))})"
        for kind, value in (own.robustness or {}).items()
    ]
    return f"Clean {percent(own.test_top1)}; mean over the severities: {', '.join(parts)}."


def first_counts(relation: Relation) -> str:
    """Whether classes of low accuracy were given more samples."""
    r = relation.correlation
    if r is None:
        return "All classes have the same accuracy or the same number of samples, so there is no correlation."
    told = (
        "the weaker a class, the more samples it was given"
        if r <= -CLEAR
        else "the stronger a class, the more samples it was given"
        if r >= CLEAR
        else "samples and accuracy of a class have little to do with each other"
    )
    return f"Correlation r = {signed(r)} over {len(relation.labels)} classes: {told}.{_same(relation)}"


def gained_counts(relation: Relation) -> str:
    """Whether classes that were given more samples gained more."""
    r = relation.correlation
    if r is None:
        return "All classes gained as much or were given as many samples, so there is no correlation."
    told = (
        "the more samples a class was given, the more it gained"
        if r >= CLEAR
        else "the more samples a class was given, the less it gained"
        if r <= -CLEAR
        else "samples and gain of a class have little to do with each other"
    )
    return f"Correlation r = {signed(r)} over {len(relation.labels)} classes: {told}.{_same(relation)}"


def _same(relation: Relation) -> str:
    if relation.split == "training":
        return ""
    return (
        " (Held-out accuracy; on the training samples, as in the paper, all classes are alike or it was not recorded.)"
    )


def feature_map(found: FeatureMap) -> str:
    """How far kept and dropped samples lie from their class's real ones, in all components."""
    kept, dropped = (_distance(found, kind) for kind in ("kept", "dropped"))
    if kept is None or dropped is None:
        return "There are not both kept and dropped samples, so there is nothing to compare."
    verdict = "dropped ones lie further out" if dropped > kept else "dropped ones do not lie further out"
    return (
        f"From the centre of their class's real samples, kept synthetic samples are {kept:.2f} times as far away as "
        f"the real ones are, dropped ones {dropped:.2f} times: {verdict}."
    )


def _distance(found: FeatureMap, kind: str) -> float | None:
    """Median distance of a kind's samples to the centre of their class's real ones, in units of the real ones'."""
    real = found.kinds == KINDS.index("real")
    centres = {label: found.components[real & (found.labels == label)].mean(0) for label in set(found.labels[real])}

    def median(chosen: np.ndarray) -> float:
        rows = [row for row in np.flatnonzero(chosen) if found.labels[row] in centres]
        apart = [np.linalg.norm(found.components[row] - centres[found.labels[row]]) for row in rows]
        return float(np.median(apart)) if apart else 0.0

    own, others = median(real), median(found.kinds == KINDS.index(kind))
    return others / own if own and others else None


def hours(own: Summary) -> str:
    """What took most of the time."""
    total = sum(own.device_hours.values())
    unit, scale = time_unit(total)
    longest = max(own.device_hours, key=lambda stage: own.device_hours[stage])
    missing = "" if "adapt" in own.device_hours or not own.generated else " What adapting took was not recorded."
    return (
        f"{scale * total:.3g} {DEVICES.get(own.device or '', 'device')} {unit} in all, most of it "
        f"{STAGES[longest]} ({percent(own.device_hours[longest] / total)}).{missing}"
    )
