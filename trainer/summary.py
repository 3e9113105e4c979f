"""The numbers of one run, read from its folder: how good, how fast, how idle, and where every sample went.

Loads neither torch nor matplotlib, and measures nothing itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from pydantic import BaseModel

from protocol.messages import class_source
from trainer import books
from trainer.durable import write_durably
from trainer.metrics import class_counts
from trainer.metrics.device_hours import device_hours
from trainer.record import Record, Row
from trainer.spans import intersection, length, spans

TEMPLATE = "template"  # who perturbs captions where no language model does


class Summary(BaseModel):
    """One run in numbers. Counts are of samples unless they say otherwise; None: does not apply, or is not known."""

    run: str
    mode: str
    iterations: int  # finished
    iterations_planned: int
    updates: int  # optimiser updates at the end of the last finished iteration

    headline: str | None  # the task's main figure: "test_top1", "mAP", "test_uar", ...; None: nothing is held out
    score: float | None  # that figure at the end; a part of one, more is better
    best_score: float | None  # highest of any iteration
    rank1: float | None  # re-identification: part of the queries whose nearest picture is of the same person
    test_top1: float | None  # at the end, of the held-out split; parts of one
    best_test_top1: float | None  # highest of any iteration
    train_top1: float | None
    worst_case_disparity: float | None  # lowest over highest class accuracy
    per_class: list[float | None] | None  # accuracy by label
    train_val_gap: float | None  # training minus held-out accuracy (GenDataAgent Table 14)
    synthetic_top1: float | None  # of the last iteration's synthetic samples (Figure 6c)
    robustness: dict[str, float] | None  # corruption -> held-out accuracy, mean over severities (Table 13)
    fvd: float | None  # Frechet video distance of the clips trained on from real ones of their classes (ARGen eq. 29)
    sfvd: float | None  # its mean over subjects (eq. 33); metrics.jsonl has each
    tfvd: float | None  # and over classes
    diversity: float | None  # mean perceptual distance of those clips within a class (ARGen Table 8)
    scarce: dict[str, int] | None  # class name -> label, of those that the generator was asked for as such; None: none
    count_correlation: float | None  # Pearson's r over classes: first synthetic samples, accuracy before (Figure 5)
    gain_correlation: float | None  # the same of all synthetic samples and the gain of accuracy (Figure 5)

    wall_s: float | None  # from the trainer's first interval to its last, pauses between resumptions included
    trainer_idle: float | None  # part of wall_s in which the trainer waited for samples
    generator_idle: float | None  # see `generator_idle`
    overlap_s: float  # time in which samples were generated while the model was trained

    requested: int  # what the service promised
    generated: int  # arrived: the samples of batches/
    failed_units: int  # work units that failed for good
    dead: int  # the samples of those
    outstanding: int  # requested, not arrived and not dead
    near_copies_flagged: int  # arrived samples that the service calls near copies of a real one
    near_copies: int  # of them, dropped for it
    privacy_dropped: int  # too near to a real one; offline, where samples are drawn again, counted once an iteration
    vog_dropped: int  # offline, where samples are drawn again, counted once an iteration
    similarity_dropped: int  # likewise, where that filter takes VoG's place
    trained: int  # distinct samples that passed
    stale: int  # dropped for coming too late
    unused: int | None  # arrived, and handed to no iteration, nor stale; None: offline
    lookahead_seen: int | None  # synthetic rows (a sample is a row once an epoch); None: lookahead was off
    lookahead_kept: int | None  # of them, trained on
    prompts_by: dict[str, int]  # who perturbed captions -> the samples made from its prompts
    for_classes: dict[str, int]  # scarce class -> samples that arrived for it as such, not for a sample of it
    caption_fallback: float | None  # part of those that the template made; None: nothing perturbed captions
    device: str | None  # that the model was trained on: "cpu", "cuda"
    device_hours: dict[str, float]  # by stage (Figure 4), see `metrics.device_hours`
    outages: int  # times that service or broker went away
    balanced: bool | None  # whether the run's files agree on all of that (see `books`); None: offline


def summarise(folder: Path) -> Summary:
    """Summarise a run's folder, finished or not.

    Raises:
        ConfigError: the folder holds no run.
    """
    return summary_of(Record.open(folder))


def write(folder: Path) -> Summary:
    """Summarise a run's folder into its `summary.json`."""
    summary = summarise(folder)
    write_durably(folder / "summary.json", summary.model_dump_json(indent=2).encode())
    return summary


def summary_of(record: Record) -> Summary:
    config, last = record.config, _last(record)
    account = books.balance(record)
    return Summary(
        run=config.run,
        mode=config.mode,
        iterations=len(record.metrics),
        iterations_planned=config.iterations,
        updates=last.get("updates", 0),
        wall_s=wall_s(record),
        trainer_idle=trainer_idle(record),
        generator_idle=generator_idle(record),
        overlap_s=length(
            intersection(spans(record.intervals("generator", "generate")), spans(record.intervals("trainer", "train")))
        ),
        device=last.get("device"),
        device_hours=device_hours(record),
        outages=sum(row["event"] == "outage" for row in record.events),
        balanced=None if config.mode == "offline" else not account.problems,
        **_accuracies(record),
        **_samples(record, account),
        **_prompts(record),
        **_clips(record),
    )


def _last(record: Record) -> Row:
    return record.metrics[-1] if record.metrics else {}


def _accuracies(record: Record) -> dict[str, Any]:
    """How good the model is, and what that has to do with the classes' synthetic samples."""
    last, first, gained = _last(record), class_counts.first(record), class_counts.gained(record)
    corrupted = last.get("corrupted")
    names = ("test_top1", "train_top1", "worst_case_disparity", "per_class", "train_val_gap", "synthetic_top1", "rank1")
    headline = headline_of(last)
    scores = [row[headline] for row in record.metrics if headline in row]
    return {name: last.get(name) for name in names} | {
        "headline": headline,
        "score": last.get(headline),
        "best_score": max(scores, default=None),
        "best_test_top1": max((row["test_top1"] for row in record.metrics if "test_top1" in row), default=None),
        "robustness": corrupted and {kind: mean(values.values()) for kind, values in corrupted.items()},
        "count_correlation": first.correlation if first else None,
        "gain_correlation": gained.correlation if gained else None,
    }


def _clips(record: Record) -> dict[str, Any]:
    """What was measured of synthetic clips, and the classes that were short of them."""
    last, short = _last(record), {c.class_name: c.label for asked in record.feedback for c in asked.classes}
    means = {name: (last.get(name) or {}).get("mean") for name in ("sfvd", "tfvd", "diversity")}
    return {"fvd": last.get("fvd"), **means, "scarce": short or None}


def headline_of(row: Row) -> str | None:
    """Which field of a line of metrics.jsonl is its task's main figure; None: nothing was held out."""
    return row.get("headline", "test_top1" if "test_top1" in row else None)


def _samples(record: Record, account: books.Books) -> dict[str, Any]:
    """Where every sample went."""
    fates, looking = Counter(row["fate"] for row in record.selection), record.config.lookahead.enabled
    return {
        "requested": account.requested,
        "generated": len(record.samples()),
        "failed_units": sum(batch.error is not None for batch in record.batches),
        "dead": account.fates["dead"],
        "outstanding": sum(account.outstanding.values()),
        "near_copies_flagged": sum(sample.near_copy for sample in record.samples()),
        "near_copies": fates["near copy"],
        "privacy_dropped": fates["privacy"],
        "vog_dropped": fates["vog"],
        "similarity_dropped": fates["similarity"],
        "trained": len({row["id"] for row in record.selection if row["kept"]}),
        "stale": fates["stale"],
        "unused": None if record.config.mode == "offline" else account.fates["unused"],
        "lookahead_seen": _total(record, "lookahead_seen") if looking else None,
        "lookahead_kept": _total(record, "synthetic_rows") if looking else None,
    }


def _prompts(record: Record) -> dict[str, Any]:
    """Who perturbed the captions that samples were made from, and which of them were made for a class."""
    by = Counter(sample.prompt_by for sample in record.samples() if sample.prompt_by is not None)
    scarce = {class_source(name): name for name in record.class_names().values()}
    found = Counter(scarce[sample.source_id] for sample in record.samples() if sample.source_id in scarce)
    told: dict[str, Any] = {"for_classes": dict(sorted(found.items()))}
    return told | {"prompts_by": dict(by.most_common()), "caption_fallback": by[TEMPLATE] / by.total() if by else None}


def _total(record: Record, name: str) -> int:
    return int(sum(row[name] for row in record.metrics))


# ---------------------------------------------------------------- time


def wall_s(record: Record) -> float | None:
    """Seconds from the start of the trainer's first interval to the end of its last; None: it did nothing yet."""
    own = spans(record.intervals("trainer"))
    return own[-1][1] - own[0][0] if own else None


def trainer_idle(record: Record) -> float | None:
    """The part of the wall time that the trainer spent waiting for samples; None without wall time."""
    wall = wall_s(record)
    return length(spans(record.intervals("trainer", "wait"))) / wall if wall else None


def generator_idle(record: Record) -> float | None:
    """The part of its time in which no generator worked for this run.

    Its time is from the start of the first batch to the end of the trainer's last interval: the warm-up before, in
    which nothing was asked for, does not count as idle; the end, for which nothing more is asked, does. With several
    generators, idle means that none of them worked. Their clocks are taken to agree with the trainer's. None: nothing
    was generated.
    """
    busy, own = spans(record.intervals("generator", "generate")), spans(record.intervals("trainer"))
    if not busy or not own or own[-1][1] <= busy[0][0]:
        return None
    asked = (busy[0][0], own[-1][1])
    return 1 - length(intersection(busy, [asked])) / (asked[1] - asked[0])


def overlaps(trace: Iterable[Row]) -> list[tuple[Row, Row]]:
    """The (generate, train) pairs of intervals that overlap, decided by the order of their starts and ends.

    Intervals that only touch do not overlap, nor does an empty one.
    """
    kinds = {("generator", "generate"): 0, ("trainer", "train"): 1}
    events = []
    for row in trace:
        side = kinds.get((row["who"], row["what"]))
        if side is not None and row["start"] < row["end"]:
            events += [(row["start"], True, side, row), (row["end"], False, side, row)]
    events.sort(key=lambda event: event[:2])  # at equal times, ends come first
    open_rows: tuple[list[Row], list[Row]] = ([], [])
    pairs = []
    for _, starts, side, row in events:
        if not starts:
            open_rows[side].remove(row)
            continue
        open_rows[side].append(row)
        pairs += [(row, other) if side == 0 else (other, row) for other in open_rows[1 - side]]
    return pairs
