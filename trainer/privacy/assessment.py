"""The privacy of a synthetic set in numbers: how near it comes to the training images, against how near other real
images come to them, and what membership inference makes of it.

Knows sets of images and the spaces they are compared in; nothing of pages or folders.

Shapes: N synthetic, M held-out, T training images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from trainer.privacy import membership
from trainer.privacy.distances import Nearest, nearest
from trainer.privacy.intervals import Interval, bootstrap, wilson
from trainer.privacy.spaces import Space
from trainer.privacy.subject import Subject

PAIRS = 12  # closest, that are told
POINTS = 200  # of a curve, at most
PARTS = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)


class Options(BaseModel):
    quantile: float = Field(default=0.05, gt=0.0, lt=1.0)  # of the held-out images' distances: so near is called close
    near_copy: float = Field(default=0.02, ge=0.0, le=1.0)  # RMS difference of pixels up to which a sample is a near
    # copy; the service's default
    seed: int = Field(default=0, ge=0, lt=2**63)  # of the images drawn for membership inference, and of the bootstrap


class Distances(BaseModel):
    """Distances to the nearest training image."""

    images: int
    quantiles: dict[float, float]  # part of the images -> distance
    curve: list[float]  # at evenly spaced parts from 0 to 1


class Comparison(BaseModel):
    """Synthetic against held-out images: below 1 and above `quantile`, synthetic ones are the nearer."""

    synthetic: Distances
    held_out: Distances
    median_ratio: float | None  # synthetic over held-out; None: the latter is 0
    median_ratio_interval: Interval | None
    limit: float  # the quantile of the held-out images' distances
    closer: float  # part of the synthetic images that are no further away; about the quantile, if they are like others
    closer_interval: Interval


class MembershipInference(BaseModel):
    members: int  # training images, and as many others
    classes: int | None  # that have as many of each; None: the images were drawn whatever their class
    auc: float
    auc_interval: Interval
    true_positive_rate: float
    true_positive_rate_interval: Interval
    false_positive_rate: float  # at which that holds
    roc: list[tuple[float, float]]  # false and true positive rates


class Pair(BaseModel):
    """A synthetic image and the training image nearest to it, by their rows and ids."""

    distance: float
    synthetic: int
    train: int
    synthetic_id: str
    train_id: str
    synthetic_class: str
    train_class: str


class Findings(BaseModel):
    """What one space shows. Intervals are of 95 %."""

    space: str
    measure: str
    caution: str
    overall: Comparison
    within_class: Comparison | None  # None: the held-out images show other classes
    membership: MembershipInference
    closest: list[Pair]


class Assessment(BaseModel):
    title: str
    synthetic_are: str
    images: dict[str, int]  # "train", "held_out", "synthetic" -> how many
    classes: int
    train_split: str
    held_out_split: str
    options: Options
    near_copy_rate: float  # part of the synthetic images whose pixels are nearly those of a training image
    near_copy_rate_interval: Interval
    near_copies: int
    findings: list[Findings]  # pixels first
    warnings: list[str]


def assess(subject: Subject, spaces: Sequence[Space], options: Options) -> Assessment:
    """Compare the images of a subject in each space, of which the first is their pixels."""
    found, copies, repeated = [], 0, 0
    for number, space in enumerate(spaces):
        vectors = [space.vectors(images) for images in (subject.synthetic, subject.held_out, subject.train)]
        findings, synthetic, held_out = _findings(subject, space, vectors, options)
        found.append(findings)
        if number == 0:
            copies = int((synthetic <= options.near_copy).sum())
            repeated = int((held_out == 0).sum())
    total = len(subject.synthetic)
    return Assessment(
        title=subject.title,
        synthetic_are=subject.synthetic_are,
        images={"train": len(subject.train), "held_out": len(subject.held_out), "synthetic": total},
        classes=len(subject.classes),
        train_split=subject.train_split,
        held_out_split=subject.held_out_split,
        options=options,
        near_copy_rate=copies / total,
        near_copy_rate_interval=wilson(copies / total, total),
        near_copies=copies,
        findings=found,
        warnings=_warnings(subject, repeated),
    )


def _warnings(subject: Subject, repeated: int) -> list[str]:
    told = []
    if not subject.same_classes:
        told.append(
            "The held-out images show other classes than the training images, as other people. So distances within a "
            "class cannot be compared, and membership inference measures in part that classes differ: an area above "
            "0.5 may come of the synthetic images showing the classes that they were asked for. Only the overall "
            "distances mean something, and they lean the same way."
        )
    if repeated:
        told.append(
            f"{repeated} of the held-out images are the same, pixel by pixel, as a training image: they are not held "
            "out, and make synthetic images look further away than they are. Remove them from one split."
        )
    if empty := set(range(len(subject.classes))) - set(subject.synthetic.labels.tolist()):
        told.append(f"{len(empty)} of the {len(subject.classes)} classes have no synthetic images.")
    return told


def _findings(
    subject: Subject, space: Space, vectors: Sequence[Tensor], options: Options
) -> tuple[Findings, Tensor, Tensor]:
    """What a space shows; and, to the nearest training image, the distance of each synthetic and held-out one."""
    made, others, train = vectors
    generator = torch.Generator().manual_seed(options.seed)
    of = {"synthetic": subject.synthetic.labels, "held_out": subject.held_out.labels, "train": subject.train.labels}
    near = nearest(made, train)
    synthetic, held_out = near.distance * space.scale, nearest(others, train).distance * space.scale
    within = None
    if subject.same_classes:
        pairs = [(made, of["synthetic"]), (others, of["held_out"])]
        apart = [nearest(rows, train, labels=(labels, of["train"])).distance * space.scale for rows, labels in pairs]
        within = compare(*apart, options.quantile, generator)
    findings = Findings(
        space=space.name,
        measure=space.measure,
        caution=space.caution,
        overall=compare(synthetic, held_out, options.quantile, generator),
        within_class=within,
        membership=_membership(subject, train, others, made, generator),
        closest=_closest(subject, near, space.scale),
    )
    return findings, synthetic, held_out


def compare(synthetic: Tensor, held_out: Tensor, quantile: float, generator: torch.Generator) -> Comparison:
    """Compare distances [N] with distances [M], all finite."""

    def ratio(one: Tensor, other: Tensor) -> Tensor:
        return quantile_of(one, 0.5) / quantile_of(other, 0.5).clamp(min=1e-12)  # some resamples have a median of 0

    def closer(one: Tensor, other: Tensor) -> Tensor:
        return (one <= quantile_of(other, quantile)[..., None]).double().mean(-1)

    has_ratio = bool((held_out > 0).double().mean() > 0.5)
    return Comparison(
        synthetic=_distances(synthetic),
        held_out=_distances(held_out),
        median_ratio=ratio(synthetic, held_out).item() if has_ratio else None,
        median_ratio_interval=bootstrap(ratio, synthetic, held_out, generator) if has_ratio else None,
        limit=quantile_of(held_out, quantile).item(),
        closer=closer(synthetic, held_out).item(),
        closer_interval=bootstrap(closer, synthetic, held_out, generator),
    )


def quantile_of(values: Tensor, part: float) -> Tensor:
    """Quantile [...] of values [..., N], between its neighbours; of any size, which `torch.quantile` is not."""
    ordered, place = values.sort(dim=-1).values, part * (values.shape[-1] - 1)
    low = int(place)
    high = min(low + 1, values.shape[-1] - 1)
    return ordered[..., low] + (place - low) * (ordered[..., high] - ordered[..., low])


def _distances(values: Tensor) -> Distances:
    points = min(len(values), POINTS)
    curve = [quantile_of(values, point / (points - 1)).item() for point in range(points)]
    return Distances(images=len(values), quantiles={p: quantile_of(values, p).item() for p in PARTS}, curve=curve)


def _membership(
    subject: Subject, train: Tensor, others: Tensor, made: Tensor, generator: torch.Generator
) -> MembershipInference:
    """The attack on as many training images as others, of each class where they show the same ones."""
    labels = subject.train.labels, subject.held_out.labels
    if not subject.same_classes:
        labels = torch.zeros_like(labels[0]), torch.zeros_like(labels[1])
    rows = drawn_alike(*labels, generator)
    scores = [-nearest(of[chosen], made).distance for of, chosen in zip((train, others), rows, strict=True)]
    false, true = membership.roc(*scores)
    point = membership.recognised(*scores)
    shown = torch.linspace(0, len(false) - 1, min(len(false), POINTS)).round().long()
    return MembershipInference(
        members=len(rows[0]),
        classes=len(labels[0][rows[0]].unique()) if subject.same_classes else None,
        auc=membership.auc(*scores),
        auc_interval=membership.auc_interval(*scores),
        true_positive_rate=point.true_positive_rate,
        true_positive_rate_interval=point.interval,
        false_positive_rate=point.false_positive_rate,
        roc=list(zip(false[shown].tolist(), true[shown].tolist(), strict=True)),
    )


def drawn_alike(one: Tensor, other: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows of two sets, ascending, at random: of each label as many of the one as of the other, and as many as can be.

    Args:
        one, other: labels [N], [M].
    """
    fewest = Counter(one.tolist()) & Counter(other.tolist())
    found = []
    for labels in (one, other):
        order = torch.randperm(len(labels), generator=generator)
        chosen = [order[labels[order] == label][:count] for label, count in sorted(fewest.items())]
        found.append(torch.cat(chosen).sort().values)
    return found[0], found[1]


def _closest(subject: Subject, near: Nearest, scale: float) -> list[Pair]:
    rows = near.distance.argsort(stable=True)[:PAIRS].tolist()
    return [
        Pair(
            distance=near.distance[row].item() * scale,
            synthetic=row,
            train=(real := int(near.index[row])),
            synthetic_id=subject.synthetic.ids[row],
            train_id=subject.train.ids[real],
            synthetic_class=subject.synthetic.class_of(row),
            train_class=subject.train.class_of(real),
        )
        for row in rows
    ]
