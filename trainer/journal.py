"""What a run writes down: metrics, events and a trace of every interval, as JSON lines and for TensorBoard.

    metrics.jsonl   one line an iteration
    events.jsonl    what happened once: outages, late answers, corrupt blobs, resumes
    selection.jsonl one line a sample: what became of it in which iteration, its filter's score, where its pixels are
    trace.jsonl     one line an interval: who did what, from when to when (unix seconds)

What a full disk does not take is kept in memory and written once there is room. Knows nothing of models or queues.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

from protocol import logs, tracing
from protocol.disk import full_disk_told
from protocol.errors import DiskFull
from trainer import record, scalars
from trainer.durable import ADVICE, write_durably
from trainer.pool import Candidate

log = logging.getLogger("trainer")

RESUMED = ("metrics.jsonl", "selection.jsonl")  # what a resumed run goes on from, with its checkpoint


class Journal:
    """Append-only record of one run. Safe to use from several threads; one process at a time."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.listeners: list[Callable[[str, Mapping[str, Any]], None]] = []  # told each line: file name, row
        self.doing: tuple[str, float] | None = None  # what the trainer does now, and since when; None: nothing timed
        self._lock = threading.Lock()
        self._waiting: dict[str, bytes] = {}  # file name -> lines for which there was no room yet
        for path in folder.glob("*.jsonl"):
            _cut_unfinished_line(path)
        (folder / "tensorboard").mkdir(exist_ok=True)
        self._board = f"tensorboard/events.out.tfevents.{time.time_ns()}.{os.getpid()}"  # one a process
        self._add(self._board, scalars.header())

    def metrics(self, row: Mapping[str, Any]) -> None:
        """One iteration's numbers. Numbers at the top level also go to TensorBoard."""
        self._append("metrics.jsonl", row)
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float) and name != "iteration"}
        self._add(self._board, scalars.scalars(row["iteration"], numbers))

    def event(self, name: str, message: str, **details: Any) -> None:
        """Something that happened, said once in the log and kept."""
        log.warning(message, extra={"event": name})
        self._append("events.jsonl", {"time": time.time(), "event": name, "message": message, **details})

    def selection(
        self,
        iteration: int,
        candidates: Sequence[Candidate],
        scores: Sequence[float],
        kept: Sequence[bool],
        filter: str | None = "vog",
    ) -> None:
        """What became of the candidates of an iteration that a filter looked at, and their scores by it; None: there
        was none, and the scores are not looked at."""
        for candidate, score, keep in zip(candidates, scores, kept, strict=True):
            score_by = {} if filter is None or math.isnan(score) else {filter: score}
            self._fate(iteration, candidate, "trained" if keep else str(filter), score_by)

    def dropped(self, iteration: int, candidates: Sequence[Candidate], why: str) -> None:
        """Samples that an iteration did not choose among: "stale", "near copy", "privacy", or "pool"."""
        for candidate in candidates:
            self._fate(iteration, candidate, why, {})

    def emptied(self, iteration: int, before: Sequence[Candidate], after: Sequence[Candidate]) -> None:
        """Say of which classes every sample was dropped: they train on their real ones."""
        came = Counter(candidate.sample.class_name for candidate in before)
        for name in sorted(came.keys() - {candidate.sample.class_name for candidate in after}, key=str):
            message = f"iteration {iteration}: all {came[name]} synthetic samples of class {name!r} were dropped"
            self.event("class_emptied", message, iteration=iteration, class_name=name)

    def _fate(self, iteration: int, candidate: Candidate, fate: str, scores: Mapping[str, float]) -> None:
        sample = candidate.sample
        row = {"iteration": iteration, "id": sample.id, "source": sample.source_id, "class": sample.class_name}
        row |= {"file": candidate.file.name, "row": candidate.row, "vog": None, **scores}
        self._append("selection.jsonl", row | {"kept": fate == "trained", "fate": fate})

    def interval(self, who: str, what: str, start: float, end: float, **details: Any) -> None:
        """An interval that has ended.

        Args:
            who: "trainer" or "generator". what: "score", "wait", "vog", "train", "evaluate", "generate", ...
            start, end: unix seconds.
        """
        self._append("trace.jsonl", {"who": who, "what": what, "start": start, "end": end, **details})

    @contextmanager
    def iteration(self, iteration: int) -> Iterator[None]:
        """Around one iteration, which its log lines and its trace then name."""
        with logs.fields(iteration=iteration), tracing.span("iteration"):
            yield

    @contextmanager
    def timed(self, what: str, **details: Any) -> Iterator[None]:
        """Record the trainer's interval around a block."""
        start = time.time()
        self.doing = what, start
        with tracing.span(what, **details):
            yield
        self.doing = None
        self.interval("trainer", what, start, time.time(), **details)

    def rewind(self, iteration: int, *, selected: bool) -> None:
        """Forget what a resumed run writes again: the metrics of `iteration` and later, and its selections.

        Args:
            selected: the run goes on within `iteration`, whose selections stand.
        """
        for name, first in (("metrics.jsonl", iteration), ("selection.jsonl", iteration + selected)):
            kept = [row for row in record.rows(self.folder / name) if row["iteration"] < first]
            with self._lock:
                write_durably(self.folder / name, "".join(json.dumps(row) + "\n" for row in kept).encode())

    def sync(self) -> None:
        """Put on the disk what a resumed run goes on from; to be done before its checkpoint. Raises DiskFull."""
        for name in RESUMED:
            with self._lock, self._room_for(name), self._open(name) as file:
                self._write(file, name)
                os.fsync(file.fileno())

    def close(self) -> None:
        """Raises DiskFull when there is no room for the last lines."""
        for name in list(self._waiting):
            with self._lock, self._room_for(name), self._open(name) as file:
                self._write(file, name)

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        self._add(name, json.dumps(row).encode() + b"\n")
        for listener in self.listeners:
            listener(name, row)

    def _add(self, name: str, data: bytes) -> None:
        with self._lock:
            self._waiting[name] = self._waiting.get(name, b"") + data
            with suppress(DiskFull), self._room_for(name), self._open(name) as file:
                self._write(file, name)

    def _room_for(self, name: str) -> AbstractContextManager[None]:
        return full_disk_told(self.folder / name, ADVICE)

    def _open(self, name: str) -> FileIO:
        return (self.folder / name).open("ab", buffering=0)

    def _write(self, file: FileIO, name: str) -> None:
        """Append what waits, whole or not at all."""
        data, written = self._waiting.get(name, b""), 0
        try:
            while written < len(data):
                written += file.write(data[written:])
        except OSError:
            if written:
                file.truncate(file.tell() - written)
            raise
        self._waiting.pop(name, None)


class Unwritten(Journal):
    """The journal of a process that is not the first: what it would say, that one says."""

    def __init__(self) -> None:
        pass

    def metrics(self, row: Mapping[str, Any]) -> None:
        pass

    def event(self, name: str, message: str, **details: Any) -> None:
        pass

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        pass


def _cut_unfinished_line(path: Path) -> None:
    """A process that was killed may have left half a line, to which the next one must not be added."""
    with path.open("rb+") as file:
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)
