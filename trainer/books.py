"""Where every synthetic sample of a run went, and whether the run's own records agree on it.

    python -m trainer.books runs/pets [--broker URL]

A sample that was asked for is trained on, in the pool that stands in for the real samples, filtered (by variance of
gradients, by similarity, as a near copy, or for privacy as too near to a real sample), stale, unused (it came after the
last iteration took its samples), dead (its work unit failed for good), or outstanding. The books are drawn up from what
was written at the time: questions, promises, answers, choices and the newest checkpoint; counters are only compared
with them. Reads only, and loads torch only for a checkpoint.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocol import codec
from protocol.broker import URL_VARIABLE
from protocol.bus_audit import OnBroker, on_broker
from protocol.errors import OnTheFlyError
from protocol.messages import sample_id
from trainer.record import Record, Row

FATES = ("trained", "pool", "vog", "similarity", "near copy", "privacy", "stale", "unused", "dead")
SHOWN = 5  # ids in a message


@dataclass(frozen=True)
class Saved:
    """What a checkpoint says of samples. Without one, a run is at its beginning."""

    iteration: int = 0  # to go on with
    done: int = 0  # of its batches; 0: its samples are not chosen yet
    updates: int = 0
    kept: tuple[str, ...] = ()  # the training set of that iteration, once chosen
    used: frozenset[str] = frozenset()
    stale: frozenset[str] = frozenset()

    @classmethod
    def of(cls, state: dict[str, Any] | None) -> Saved:
        """Of what `checkpoint.load` returns."""
        if state is None:
            return cls()
        at, pool = state["position"], state["pool"]
        ids = {"kept": tuple(at["kept"]), "used": frozenset(pool["used"]), "stale": frozenset(pool["stale"])}
        return cls(at["iteration"], at["done"], at["updates"], **ids)

    def decided(self, iteration: int) -> bool:
        """Whether a resumed run will not decide again what it decided at this iteration."""
        return iteration < self.iteration + (self.done > 0)


@dataclass(frozen=True)
class Books:
    """Counts are of samples."""

    run: str
    finished: bool
    fates: dict[str, int]  # one of FATES -> samples; offline, all that arrived are "unused": they are drawn at will
    outstanding: dict[str, int]  # "feedback 3: in work" and the like -> samples
    problems: list[str]  # where records contradict each other

    @property
    def requested(self) -> int:
        """What the service promised, and what arrived beyond."""
        return sum(self.fates.values()) + sum(self.outstanding.values())

    @property
    def balanced(self) -> bool:
        """No contradiction, and nothing outstanding once the run is finished."""
        return not self.problems and not (self.finished and self.outstanding)


def open_books(folder: Path, broker: str | None = None) -> Books:
    """The books of a run, finished or not, also while it is at work.

    Args:
        broker: URL of the run's broker, which knows where outstanding samples are.

    Raises:
        ConfigError: the folder holds no run.
        CheckpointCorrupt, BrokerUnavailable.
    """
    from trainer import checkpoint

    run = Record.open(folder).config.run
    queued = on_broker(broker, run) if broker else None  # first: what moves meanwhile moves to what is read later
    saved = Saved.of(checkpoint.load(folder / "checkpoints"))
    return balance(Record.open(folder), saved, queued)


def balance(record: Record, saved: Saved | None = None, queued: OnBroker | None = None) -> Books:
    """The books that a record makes.

    Args:
        saved: the newest checkpoint; None: neither it nor the pixels are looked at, and all that was written counts.
        queued: what is on the broker; None: not looked at.
    """
    config = record.config
    chosen = [row for row in record.selection if saved is None or saved.decided(row["iteration"])]
    metrics = [row for row in record.metrics if saved is None or row["iteration"] < saved.iteration]
    outstanding, problems = _outstanding(record, queued)
    problems += _answers(record)
    if config.mode == "offline":
        chosen = []
    else:
        problems += [*_choices(record, chosen), *_counts(metrics, chosen)]
    if saved is not None:
        problems += _pixels(record, chosen)
        problems += _checkpoint(saved, metrics, chosen, offline=config.mode == "offline")
    if queued is not None:
        problems += _dead_letters(record, queued)
    decided = {row["id"]: row["fate"] for row in chosen}
    fates = Counter(decided.get(sample.id, "unused") for sample in record.samples())
    fates["dead"] = sum(len(batch.missing) for batch in record.batches)
    position = saved.iteration if saved is not None else len(metrics)
    counts = {fate: fates[fate] for fate in FATES}
    return Books(config.run, position >= config.iterations, counts, outstanding, problems)


# ---------------------------------------------------------------- asked and answered


def _outstanding(record: Record, queued: OnBroker | None) -> tuple[dict[str, int], list[str]]:
    """Where promised samples are that did not arrive; and what arrived beyond the promise."""
    promised = {promise.feedback: promise.samples for promise in record.accepted}
    answered = {(batch.feedback, batch.unit) for batch in record.batches}
    arrived = Counter(dict.fromkeys(promised, 0))
    for batch in record.batches:
        arrived[batch.feedback] += len(batch.samples) + len(batch.missing)
    places: dict[int, Counter[str]] = defaultdict(Counter)
    for unit in queued.units if queued else ():
        if (unit.feedback, unit.unit) not in answered:
            places[unit.feedback]["in work"] += len(unit.rows)
    for batch in queued.batches if queued else ():
        if (batch.feedback, batch.unit) not in answered:
            places[batch.feedback]["published"] += len(batch.samples) + len(batch.missing)
    outstanding, problems = {}, []
    for number, came in sorted(arrived.items()):
        left = promised.get(number, came) - came
        if left < 0:
            problems.append(f"feedback {number}: {promised[number]} samples were promised and {came} came")
        for place, count in places[number].items():
            outstanding[f"feedback {number}: {place}"] = min(count, left)
            left -= min(count, left)
        if left > 0:
            outstanding[f"feedback {number}: not on the broker" if queued else f"feedback {number}: not come"] = left
    return {where: count for where, count in outstanding.items() if count}, problems


def _answers(record: Record) -> Iterator[str]:
    """Every answer is to a question of this run, and there is one."""
    asked = {feedback.feedback: feedback for feedback in record.feedback}
    came = Counter(name for batch in record.batches for name in (*(s.id for s in batch.samples), *batch.missing))
    if twice := [name for name, times in came.items() if times > 1]:
        yield f"answered twice: {_some(twice)}"
    foreign = [batch.unit_id for batch in record.batches if batch.feedback not in asked]
    foreign += [
        sample.id
        for batch in record.batches
        for sample in batch.samples
        if batch.feedback in asked  # by another run, if the pool is that one's
        and sample.id != sample_id(asked[batch.feedback].run, batch.feedback, sample.source_id or "", sample.index)
    ]
    if foreign:
        yield f"not what this run asked for: {_some(foreign)}"


def _dead_letters(record: Record, queued: OnBroker) -> Iterator[str]:
    """A unit's dead letter and its answer without samples are written in one step."""
    told = {batch.unit_id for batch in (*record.batches, *queued.batches)} | {unit.id for unit in queued.units}
    prints = tuple(feedback.fingerprint() for feedback in record.feedback)  # others are of an earlier run of this name
    if untold := [unit.id for unit in queued.dead if unit.id not in told and unit.id.endswith(prints)]:
        yield f"dead letters of units that nobody was told of: {_some(untold)}"


# ---------------------------------------------------------------- chosen and trained


def _choices(record: Record, chosen: list[Row]) -> Iterator[str]:
    """Every sample has one fate at most, in an iteration that was not too late for it."""
    samples = {sample.id: sample for sample in record.samples()}
    iterations: dict[str, list[int]] = defaultdict(list)
    for row in chosen:
        iterations[row["id"]].append(row["iteration"])
    for name, where in iterations.items():
        if len(where) > 1:
            yield f"sample {name} was decided on more than once: in iterations {', '.join(map(str, where))}"
    if unknown := iterations.keys() - samples.keys():
        yield f"decided on, but never arrived: {_some(unknown)}"
    for row in chosen:
        sample = samples.get(row["id"])
        if sample is None or sample.feedback is None:
            continue
        age, stale = row["iteration"] - sample.feedback, row["fate"] == "stale"
        if age < 0 or stale != (age > record.config.staleness):
            yield f"sample {sample.id} of feedback {sample.feedback} was {row['fate']} in iteration {row['iteration']}"


def _counts(metrics: list[Row], chosen: list[Row]) -> Iterator[str]:
    """The counters of metrics.jsonl are those of the rows."""
    fates = defaultdict(Counter)
    for row in chosen:
        fates[row["iteration"]][row["fate"]] += 1
    stale = 0
    for row in metrics:
        of = fates[row["iteration"]]
        stale += of["stale"]
        found = {"near_copies": of["near copy"], "privacy_dropped": of["privacy"]}
        found |= {"vog_dropped": of["vog"], "similarity_dropped": of["similarity"]}
        found |= {"candidates": of["trained"] + sum(found.values()), "stale": stale}
        told = {name: row.get(name, 0) for name in found}
        if told != found:
            yield f"iteration {row['iteration']}: metrics.jsonl counts {told}, selection.jsonl {found}"


def _pixels(record: Record, chosen: list[Row]) -> Iterator[str]:
    """Every file that a trained sample came from is there, unaltered, and has its row."""
    digests = {f"{b.feedback:06d}-{b.unit:06d}.safetensors": b.blob and b.blob.sha256 for b in record.batches}
    rows: dict[str, int] = {}
    for row in chosen:
        if row["fate"] == "trained":
            rows[row["file"]] = max(row["row"], rows.get(row["file"], 0))
    for name, last in sorted(rows.items()):
        path = record.folder / "batches" / name
        data = path.read_bytes() if path.is_file() else b""
        if not data or (digests.get(name) and codec.digest(data) != digests[name]):
            yield f"{path} is {'altered' if data else 'missing'}, and was trained on"
        elif len(codec.decode(data)["images"]) <= last:
            yield f"{path} has no row {last}, which was trained on"


def _checkpoint(saved: Saved, metrics: list[Row], chosen: list[Row], *, offline: bool) -> Iterator[str]:
    """The checkpoint is at the place that the rows say."""
    if [row["iteration"] for row in metrics] != list(range(saved.iteration)):
        yield f"the checkpoint is at iteration {saved.iteration}; metrics.jsonl does not have each one before it once"
    elif metrics and saved.done == 0 and metrics[-1]["updates"] != saved.updates:
        yield f"the checkpoint is at update {saved.updates}, metrics.jsonl at {metrics[-1]['updates']}"
    if offline:
        return
    ids = {fate: {row["id"] for row in chosen if row["fate"] == fate} for fate in FATES}
    used = set().union(*(ids[fate] for fate in FATES if fate != "stale"))
    if differing := used ^ saved.used:
        yield f"handed out by the checkpoint or by selection.jsonl, not by both: {_some(differing)}"
    if differing := ids["stale"] ^ saved.stale:
        yield f"stale by the checkpoint or by selection.jsonl, not by both: {_some(differing)}"
    kept = {row["id"] for row in chosen if row["fate"] == "trained" and row["iteration"] == saved.iteration}
    if differing := kept ^ set(saved.kept):
        yield f"trained in iteration {saved.iteration} by the checkpoint or by selection.jsonl only: {_some(differing)}"


def _some(ids: Collection[str]) -> str:
    shown = ", ".join(sorted(ids)[:SHOWN])
    return shown if len(ids) <= SHOWN else f"{shown} and {len(ids) - SHOWN} more"


# ---------------------------------------------------------------- shown


def table(books: Books) -> str:
    """The books as lines of text."""
    lines = [
        f"run {books.run}, {'finished' if books.finished else 'not finished'}",
        f"{'requested':<24}{books.requested:>8}",
    ]
    lines += [f"  {fate:<22}{count:>8}" for fate, count in books.fates.items()]
    lines += [f"  {f'outstanding, {where}':<22}{count:>8}" for where, count in books.outstanding.items()]
    lines += [f"problem: {problem}" for problem in books.problems]
    return "\n".join([*lines, "balanced" if books.balanced else "NOT balanced"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the books; returns the exit status: 0 balanced, 1 not balanced, 2 there are no books to read."""
    parser = argparse.ArgumentParser(prog="python -m trainer.books", description="Where every sample of a run went.")
    parser.add_argument("folder", type=Path, help="the run's folder")
    parser.add_argument("--broker", help=f"URL of the run's broker (default: ${URL_VARIABLE}, if set)")
    options = parser.parse_args(arguments)
    try:
        books = open_books(options.folder, options.broker or os.environ.get(URL_VARIABLE))
    except OnTheFlyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(books))
    return 0 if books.balanced else 1


if __name__ == "__main__":
    sys.exit(main())
