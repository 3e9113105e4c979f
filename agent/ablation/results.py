"""What the runs of an ablation came to: every number of its tables, computed here and nowhere else.

Reads the runs' summaries; knows nothing of how they were made, nor of how the numbers are shown.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from agent.ablation import paper
from agent.ablation.grid import BASELINE, Table

STAGES = ("adaptation", "generation", "training")  # of the paper's Figure 4; generation perturbs captions, too
GENERATION = ("generate", "caption")  # of a run's stages
NOT_TRAINING = ("adapt", *GENERATION, "wait")  # its other ones are the trainer's work


class Estimate(BaseModel):
    """A mean over seeds. Of one seed the spread is not known: None."""

    mean: float
    standard_error: float | None  # of the mean
    standard_deviation: float | None  # of a seed
    n: int


class Outcome(BaseModel):
    """What one arm came to with one seed."""

    top1: float  # parts of one, at the end, of the held-out split
    disparity: float | None  # lowest over highest class accuracy
    hours: dict[str, float]  # of devices, by stage, of those that the run had
    missing: int  # synthetic samples that it asked for and did not get


class Row(BaseModel):
    """One arm in one table. None: no seed is done, or there is nothing to say."""

    label: str
    arm: str
    top1: Estimate | None  # parts of one
    gain: Estimate | None  # of top1 over the baseline, by pairs of the same seed
    disparity: Estimate | None
    hours: dict[str, float]  # of devices, by stage, means over the seeds
    missing: int  # synthetic samples that its runs asked for and did not get
    failed: dict[int, str]  # seed -> why it is not done
    paper: paper.Cell | None


class TableResult(BaseModel):
    title: str
    spread: str  # which of an estimate's spreads the paper prints
    rows: list[Row]


class Result(BaseModel):
    """All that `ablation.json` says."""

    recipe: str
    dataset: str | None  # of the paper; None: another
    seeds: list[int]
    effort: str  # that all arms have in common
    tables: dict[str, TableResult]


def outcome(summary: Mapping[str, Any]) -> Outcome:
    """Of the summary of a run that is done."""
    hours = summary["device_hours"]
    generation = [hours[stage] for stage in GENERATION if stage in hours]
    named = {"adaptation": hours.get("adapt"), "generation": sum(generation) if generation else None}
    training = sum(value for stage, value in hours.items() if stage not in NOT_TRAINING)
    return Outcome(
        top1=summary["test_top1"],
        disparity=summary["worst_case_disparity"],
        hours={stage: value for stage, value in named.items() if value is not None} | {"training": training},
        missing=summary["dead"] + summary["outstanding"],
    )


def table_result(
    name: str,
    table: Table,
    run_as: Mapping[str, str],
    outcomes: Mapping[tuple[str, int], Outcome],
    failed: Mapping[tuple[str, int], str],
    dataset: str | None,
) -> TableResult:
    """A table from what is done so far.

    Args:
        run_as: arm -> the arm with equal settings that was run for it.
        outcomes, failed: by arm and seed.
    """
    rows = []
    for label, arm in table.rows:
        own = _of(outcomes, run_as[arm])
        base = _of(outcomes, run_as[BASELINE])
        pairs = [own[seed].top1 - base[seed].top1 for seed in own if seed in base]
        rows.append(
            Row(
                label=label,
                arm=run_as[arm],
                top1=estimate([one.top1 for one in own.values()]),
                gain=None if arm == BASELINE else estimate(pairs),
                disparity=estimate([one.disparity for one in own.values() if one.disparity is not None]),
                hours=_mean_hours(list(own.values())),
                missing=sum(one.missing for one in own.values()),
                failed={seed: reason for (ran, seed), reason in failed.items() if ran == run_as[arm]},
                paper=paper.cell(name, label, dataset),
            )
        )
    return TableResult(title=table.title, spread=table.spread, rows=rows)


def estimate(values: Sequence[float]) -> Estimate | None:
    """Of one value a seed; None of none."""
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else None
    error = None if deviation is None else deviation / math.sqrt(len(values))
    return Estimate(mean=statistics.fmean(values), standard_error=error, standard_deviation=deviation, n=len(values))


def _of(outcomes: Mapping[tuple[str, int], Outcome], arm: str) -> dict[int, Outcome]:
    """By seed."""
    return {seed: one for (ran, seed), one in outcomes.items() if ran == arm}


def _mean_hours(outcomes: Sequence[Outcome]) -> dict[str, float]:
    hours = {stage: [one.hours[stage] for one in outcomes if stage in one.hours] for stage in STAGES}
    return {stage: statistics.fmean(values) for stage, values in hours.items() if values}
