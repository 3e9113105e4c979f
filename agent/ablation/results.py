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
from agent.ablation.table import BASELINE, Table

STAGES = ("adaptation", "generation", "training")  # of the paper's Figure 4; generation perturbs captions, too
GENERATION = ("generate", "caption")  # of a run's stages
TOP1, MAP, VERIFICATION, UAR = HEADLINES = ("test_top1", "mAP", "verification", "test_uar")
DISTANCES = ("FVD", "sFVD", "tFVD")  # columns of synthetic clips; others are recalls of scarce classes, by class name
SECOND = {MAP: "rank1", UAR: "test_top1"}  # headline -> what stands beside it; WAR is the top-1 accuracy
NOT_TRAINING = ("adapt", *GENERATION, "wait")  # its other ones are the trainer's work


class Estimate(BaseModel):
    """A mean over seeds. Of one seed the spread is not known: None."""

    mean: float
    standard_error: float | None  # of the mean
    standard_deviation: float | None  # of a seed
    n: int


class Outcome(BaseModel):
    """What one arm came to with one seed. All but hours in parts of one, at the end, of what is held out."""

    headline: str = TOP1  # what the score is: one of HEADLINES
    score: float
    second: float | None  # beside mAP Rank-1, beside UAR WAR, else lowest over highest class accuracy; None: not known
    hours: dict[str, float]  # of devices, by stage, of those that the run had
    missing: int  # synthetic samples that it asked for and did not get
    distances: dict[str, float] = {}  # of synthetic clips from real ones, those of DISTANCES that were measured
    recalls: list[float | None] = []  # by label; None: the class has no held-out samples
    scarce: dict[str, int] = {}  # class name -> label, of the classes that it asked the generator for as such


class Row(BaseModel):
    """One arm in one table. None: no seed is done, or there is nothing to say."""

    label: str
    arm: str
    score: Estimate | None  # parts of one
    gain: Estimate | None  # of the score over the row's baseline, by pairs of the same seed
    second: Estimate | None
    measured: dict[str, Estimate] = {}  # by column
    hours: dict[str, float]  # of devices, by stage, means over the seeds
    missing: int  # synthetic samples that its runs asked for and did not get
    failed: dict[int, str]  # seed -> why it is not done
    paper: paper.Cell | None


class TableResult(BaseModel):
    title: str
    spread: str  # which of an estimate's spreads the paper prints
    columns: list[str] = []  # beside score and second: recall of the scarce classes, by class name, and DISTANCES
    rows: list[Row]


class Result(BaseModel):
    """All that `ablation.json` says."""

    recipe: str
    dataset: str | None  # of the paper; None: another
    headline: str = TOP1  # what the scores are: one of HEADLINES
    seeds: list[int]
    effort: str  # that all arms have in common
    tables: dict[str, TableResult]


def outcome(summary: Mapping[str, Any]) -> Outcome:
    """Of the summary of a run that is done."""
    hours = summary["device_hours"]
    generation = [hours[stage] for stage in GENERATION if stage in hours]
    named = {"adaptation": hours.get("adapt"), "generation": sum(generation) if generation else None}
    training = sum(value for stage, value in hours.items() if stage not in NOT_TRAINING)
    headline = summary.get("headline") or TOP1
    return Outcome(
        headline=headline,
        score=summary[TOP1] if headline == TOP1 else summary["score"],
        second=summary.get(SECOND.get(headline, "worst_case_disparity")),
        hours={stage: value for stage, value in named.items() if value is not None} | {"training": training},
        missing=summary["dead"] + summary["outstanding"],
        distances={name: summary[name.lower()] for name in DISTANCES if summary.get(name.lower()) is not None},
        recalls=summary.get("per_class") or [],
        scarce=summary.get("scarce") or {},
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
    shown = [one for _, arm in table.rows for one in _of(outcomes, run_as[arm]).values()]
    scarce = {name: label for one in shown for name, label in one.scarce.items()}
    columns = sorted(scarce, key=lambda name: scarce[name])
    columns += [name for name in DISTANCES if any(name in one.distances for one in shown)]
    rows = []
    for label, arm in table.rows:
        over = table.over.get(arm, BASELINE)
        own, base = _of(outcomes, run_as[arm]), _of(outcomes, run_as[over])
        pairs = [own[seed].score - base[seed].score for seed in own if seed in base]
        rows.append(
            Row(
                label=label,
                arm=run_as[arm],
                score=estimate([one.score for one in own.values()]),
                gain=None if arm == over else estimate(pairs),
                second=estimate([one.second for one in own.values() if one.second is not None]),
                measured=_measured(list(own.values()), scarce),
                hours=_mean_hours(list(own.values())),
                missing=sum(one.missing for one in own.values()),
                failed={seed: reason for (ran, seed), reason in failed.items() if ran == run_as[arm]},
                paper=paper.cell(name, label, dataset),
            )
        )
    return TableResult(title=table.title, spread=table.spread, columns=columns, rows=rows)


def estimate(values: Sequence[float]) -> Estimate | None:
    """Of one value a seed; None of none."""
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else None
    error = None if deviation is None else deviation / math.sqrt(len(values))
    return Estimate(mean=statistics.fmean(values), standard_error=error, standard_deviation=deviation, n=len(values))


def _measured(outcomes: Sequence[Outcome], scarce: Mapping[str, int]) -> dict[str, Estimate]:
    """By column; those that no seed has are left out."""
    found = {name: [one.recalls[label] for one in outcomes if one.recalls] for name, label in scarce.items()}
    found |= {name: [one.distances.get(name) for one in outcomes] for name in DISTANCES}
    estimates = {name: estimate([v for v in values if v is not None]) for name, values in found.items()}
    return {name: value for name, value in estimates.items() if value is not None}


def _of(outcomes: Mapping[tuple[str, int], Outcome], arm: str) -> dict[int, Outcome]:
    """By seed."""
    return {seed: one for (ran, seed), one in outcomes.items() if ran == arm}


def _mean_hours(outcomes: Sequence[Outcome]) -> dict[str, float]:
    hours = {stage: [one.hours[stage] for one in outcomes if stage in one.hours] for stage in STAGES}
    return {stage: statistics.fmean(values) for stage, values in hours.items() if values}
