"""The numbers of one run, read from its folder: how good, how fast, how idle, and where every sample went.

Loads neither torch nor matplotlib, and measures nothing itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import BaseModel

from trainer import books
from trainer.durable import write_durably
from trainer.record import Record, Row

Span = tuple[float, float]  # start and end, unix seconds


class Summary(BaseModel):
    """One run in numbers. Counts are of samples unless they say otherwise; None: does not apply, or is not known."""

    run: str
    mode: str
    iterations: int  # finished
    iterations_planned: int
    updates: int  # optimiser updates at the end of the last finished iteration

    test_top1: float | None  # at the end, of the held-out split; parts of one
    best_test_top1: float | None  # highest of any iteration
    train_top1: float | None
    worst_case_disparity: float | None  # lowest over highest class accuracy
    per_class: list[float | None] | None  # accuracy by label
    train_val_gap: float | None

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
    vog_dropped: int  # offline, where samples are drawn again, counted once an iteration
    trained: int  # distinct samples that passed
    stale: int  # dropped for coming too late
    unused: int | None  # arrived, and handed to no iteration, nor stale; None: offline
    lookahead_seen: int | None  # synthetic rows (a sample is a row once an epoch); None: lookahead was off
    lookahead_kept: int | None  # of them, trained on
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
    config, last = record.config, record.metrics[-1] if record.metrics else {}
    looking, offline = config.lookahead.enabled, config.mode == "offline"
    account = books.balance(record)
    fates = Counter(row["fate"] for row in record.selection)
    return Summary(
        run=config.run,
        mode=config.mode,
        iterations=len(record.metrics),
        iterations_planned=config.iterations,
        updates=last.get("updates", 0),
        test_top1=last.get("test_top1"),
        best_test_top1=max((row["test_top1"] for row in record.metrics if "test_top1" in row), default=None),
        train_top1=last.get("train_top1"),
        worst_case_disparity=last.get("worst_case_disparity"),
        per_class=last.get("per_class"),
        train_val_gap=last.get("train_val_gap"),
        wall_s=wall_s(record),
        trainer_idle=trainer_idle(record),
        generator_idle=generator_idle(record),
        overlap_s=length(
            intersection(spans(record.intervals("generator", "generate")), spans(record.intervals("trainer", "train")))
        ),
        requested=account.requested,
        generated=len(record.samples()),
        failed_units=sum(batch.error is not None for batch in record.batches),
        dead=account.fates["dead"],
        outstanding=sum(account.outstanding.values()),
        near_copies_flagged=sum(sample.near_copy for sample in record.samples()),
        near_copies=fates["near copy"],
        vog_dropped=fates["vog"],
        trained=len({row["id"] for row in record.selection if row["kept"]}),
        stale=fates["stale"],
        unused=None if offline else account.fates["unused"],
        lookahead_seen=_total(record, "lookahead_seen") if looking else None,
        lookahead_kept=_total(record, "synthetic_rows") if looking else None,
        outages=sum(row["event"] == "outage" for row in record.events),
        balanced=None if offline else not account.problems,
    )


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


def spans(intervals: Iterable[Row]) -> list[Span]:
    """The union of intervals: disjoint spans in order of time."""
    joined: list[Span] = []
    for start, end in sorted((row["start"], row["end"]) for row in intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def intersection(first: Sequence[Span], second: Sequence[Span]) -> list[Span]:
    """What two unions of spans have in common."""
    both, i, j = [], 0, 0
    while i < len(first) and j < len(second):
        start, end = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        if start < end:
            both.append((start, end))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return both


def length(disjoint: Iterable[Span]) -> float:
    """Seconds in all."""
    return sum(end - start for start, end in disjoint)
