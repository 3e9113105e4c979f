"""FVD of all clips, by subject and by text (ARGen eqs. 29 to 33), from their features.

A covariance needs two clips, so a group with fewer on either side cannot be measured: it is left out and counted. Knows
nothing of clips, nor of the network that the features come from.

Shapes: N generated and M real clips, D features.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from pydantic import BaseModel
from torch import Tensor

from trainer.video_quality.frechet import FEWEST, frechet_distance


class Groups(BaseModel):
    """Frechet distances of groups of clips, as the paper's tables print them (eq. 33)."""

    mean: float | None  # None: no group has two clips on either side
    deviation: float | None  # sample standard deviation over the groups; None: of fewer than two
    distances: dict[str, float]  # group -> eq. 32
    left_out: dict[str, str]  # group -> why it was not measured
    unassigned: int  # clips, of both sides together, whose group is not known
    note: str | None = None  # why there is no mean


class Quality(BaseModel):
    """What the features of two sets of clips say. Distances are squared lengths of features; less is better."""

    generated: int  # clips
    real: int
    fvd: float | None  # None: fewer than two clips on a side
    sfvd: Groups  # by subject
    tfvd: Groups  # by text, which is the class


def quality(
    generated: Tensor,
    real: Tensor,
    subjects: tuple[Sequence[str | None], Sequence[str | None]],
    texts: tuple[Sequence[str], Sequence[str]],
) -> Quality:
    """Compare two sets of clips.

    Args:
        generated: [N, D]. real: [M, D].
        subjects, texts: of the generated and of the real clips, one each; None: the subject is not known.
    """
    return Quality(
        generated=len(generated),
        real=len(real),
        fvd=frechet_distance(generated, real) if min(len(generated), len(real)) >= FEWEST else None,
        sfvd=by_group(generated, real, *subjects),
        tfvd=by_group(generated, real, *texts),
    )


def by_group(
    generated: Tensor, real: Tensor, generated_groups: Sequence[str | None], real_groups: Sequence[str | None]
) -> Groups:
    """The Frechet distance of each group, its mean and its spread (eqs. 30 to 33).

    Args:
        generated: [N, D]. real: [M, D].
        generated_groups, real_groups: N and M names; None: belongs to no group.
    """
    rows_g, rows_t = _members(generated_groups), _members(real_groups)
    distances, left_out = {}, {}
    for name in sorted(rows_g.keys() | rows_t.keys()):
        own, other = rows_g.get(name, []), rows_t.get(name, [])
        if min(len(own), len(other)) < FEWEST:
            left_out[name] = f"{len(own)} generated and {len(other)} real clips; it takes two of each"
            continue
        distances[name] = frechet_distance(generated[own], real[other])
    values = list(distances.values())
    return Groups(
        mean=statistics.fmean(values) if values else None,
        deviation=statistics.stdev(values) if len(values) > 1 else None,
        distances=distances,
        left_out=left_out,
        unassigned=[*generated_groups, *real_groups].count(None),
        note=None if values else _why_none(left_out),
    )


def _members(groups: Sequence[str | None]) -> Mapping[str, list[int]]:
    """Group -> its rows."""
    found: dict[str, list[int]] = {}
    for row, name in enumerate(groups):
        if name is not None:
            found.setdefault(name, []).append(row)
    return found


def _why_none(left_out: Mapping[str, str]) -> str:
    if not left_out:
        return "no clip's group is known"
    return f"none of {len(left_out)} groups has two generated and two real clips"
