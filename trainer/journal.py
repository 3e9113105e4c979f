"""What a run writes down: metrics, events and a trace of every interval, as JSON lines and for TensorBoard.

    metrics.jsonl   one line an iteration
    events.jsonl    what happened once: outages, late answers, corrupt blobs, resumes
    selection.jsonl one line a candidate: its VoG score, whether it was kept, where its pixels are
    trace.jsonl     one line an interval: who did what, from when to when (unix seconds)

Knows nothing of models or queues.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from trainer import record
from trainer.durable import write_durably
from trainer.pool import Candidate

log = logging.getLogger("trainer")


class Journal:
    """Append-only record of one run. Safe to use from several threads."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._board = SummaryWriter(str(folder / "tensorboard"))

    def metrics(self, row: Mapping[str, Any]) -> None:
        """One iteration's numbers. Numbers at the top level also go to TensorBoard."""
        self._append("metrics.jsonl", row)
        for name, value in row.items():
            if isinstance(value, int | float) and name != "iteration":
                self._board.add_scalar(name, value, row["iteration"])

    def event(self, name: str, message: str, **details: Any) -> None:
        """Something that happened, said once in the log and kept."""
        log.warning(message, extra={"event": name})
        self._append("events.jsonl", {"time": time.time(), "event": name, "message": message, **details})

    def selection(
        self, iteration: int, candidates: Sequence[Candidate], scores: Sequence[float], kept: Sequence[bool]
    ) -> None:
        """What became of each candidate of an iteration: its VoG score (NaN becomes null) and whether it was kept."""
        for candidate, score, keep in zip(candidates, scores, kept, strict=True):
            sample = candidate.sample
            row = {"iteration": iteration, "id": sample.id, "source": sample.source_id, "class": sample.class_name}
            row |= {"file": candidate.file.name, "row": candidate.row}
            row |= {"vog": None if math.isnan(score) else score, "kept": keep}
            self._append("selection.jsonl", row)

    def interval(self, who: str, what: str, start: float, end: float, **details: Any) -> None:
        """An interval that has ended.

        Args:
            who: "trainer" or "generator". what: "score", "wait", "vog", "train", "evaluate", "generate", ...
            start, end: unix seconds.
        """
        self._append("trace.jsonl", {"who": who, "what": what, "start": start, "end": end, **details})

    @contextmanager
    def timed(self, what: str, **details: Any) -> Iterator[None]:
        """Record the trainer's interval around a block."""
        start = time.time()
        yield
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

    def close(self) -> None:
        self._board.close()

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        with self._lock, (self.folder / name).open("a") as file:
            file.write(json.dumps(row) + "\n")
