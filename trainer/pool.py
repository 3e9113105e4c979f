"""Synthetic samples that have arrived, on disk and in memory: which are unused, used, stale.

A batch is admitted by writing it durably; only then may its stream entry be acknowledged. A sample is handed out once.
Knows nothing of the queue or of the model.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from protocol import codec
from protocol.entries import Sample, SampleBatch
from protocol.errors import CheckpointCorrupt
from trainer.durable import write_durably

ADVICE = "restore the run's folder from a backup, or start the run anew with --fresh"


@dataclass(frozen=True)
class Candidate:
    """A synthetic sample and where its pixels lie."""

    sample: Sample
    file: Path  # safetensors with uint8 "images" [rows, H, W, 3], of clips [rows, M, H, W, 3]
    row: int
    sha256: str | None  # of the file; None: not told

    @property
    def order(self) -> tuple[int, str, int]:
        """(feedback, source, index): the order in which candidates are handed out, whatever order they came in."""
        return (self.sample.feedback or 0, self.sample.source_id or "", self.sample.index)


class Pool:
    """The admitted samples of one run. Thread-safe: the feed admits, the loop takes."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.changed = threading.Condition()
        self._batches: dict[tuple[int, int], SampleBatch] = {}
        self._unused: dict[str, Candidate] = {}
        self._used: set[str] = set()  # ids handed out
        self._stale: set[str] = set()  # ids dropped because they came too late
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.glob("*.json")):
            try:
                self._enlist(SampleBatch.model_validate_json(path.read_bytes()))
            except ValidationError as error:
                raise CheckpointCorrupt(f"{path} is damaged: {ADVICE}") from error

    # ------------------------------------------------------------ admission

    def admit(self, batch: SampleBatch, data: bytes | None) -> bool:
        """Write a batch durably, then count its samples as unused. False when the unit was answered before.

        The answer of a unit that had failed, and was tried again, takes the failure's place.

        Args:
            data: the batch's blob, verified; None for a failed unit.

        Raises:
            DiskFull: nothing is admitted; call again.
        """
        with self.changed:
            if self.answered(batch):
                return False
            if data is not None:
                write_durably(self._file(batch).with_suffix(".safetensors"), data)
            write_durably(self._file(batch).with_suffix(".json"), batch.model_dump_json().encode())
            self._enlist(batch)
            self.changed.notify_all()
            return True

    def answered(self, batch: SampleBatch) -> bool:
        """Whether the batch's unit was answered before, so that the batch is of no use."""
        before = self._batches.get((batch.feedback, batch.unit))
        return before is not None and (before.error is None or batch.error is not None)

    def _file(self, batch: SampleBatch) -> Path:
        return self.folder / f"{batch.feedback:06d}-{batch.unit:06d}"

    def _enlist(self, batch: SampleBatch) -> None:
        self._batches[batch.feedback, batch.unit] = batch
        file = self._file(batch).with_suffix(".safetensors")
        for candidate in _candidates(batch, file):
            if candidate.sample.id not in self._used and candidate.sample.id not in self._stale:
                self._unused[candidate.sample.id] = candidate

    # ------------------------------------------------------------ what has been answered

    def complete(self, feedback: int) -> bool:
        """Whether every work unit of a feedback has been answered, failed ones included."""
        answers = [batch for (number, _), batch in list(self._batches.items()) if number == feedback]
        return bool(answers) and len(answers) == answers[0].units

    def batches(self) -> list[SampleBatch]:
        """Every admitted batch, in the order (feedback, unit)."""
        with self.changed:
            return [self._batches[key] for key in sorted(self._batches)]

    # ------------------------------------------------------------ handing out

    def drop_stale(self, oldest: int) -> list[Candidate]:
        """Drop the unused samples that are older than feedback `oldest`; returns them, in order."""
        with self.changed:
            late = {name: candidate for name, candidate in self._unused.items() if candidate.order[0] < oldest}
            self._stale.update(late)
            return self._withdraw(late)

    def take(self, oldest: int, newest: float = math.inf) -> list[Candidate]:
        """Every unused sample of feedback `oldest` to `newest`, once, in the order (feedback, source, index)."""
        with self.changed:
            taken = {name: c for name, c in self._unused.items() if oldest <= c.order[0] <= newest}
            self._used.update(taken)
            return self._withdraw(taken)

    def _withdraw(self, chosen: dict[str, Candidate]) -> list[Candidate]:
        for name in chosen:
            del self._unused[name]
        return sorted(chosen.values(), key=lambda candidate: candidate.order)

    @property
    def stale(self) -> int:
        """How many samples were dropped because they came too late."""
        return len(self._stale)

    @property
    def unused(self) -> int:
        """How many samples have come and are neither taken nor stale."""
        with self.changed:
            return len(self._unused)

    def everything(self) -> list[Candidate]:
        """All samples, used or not, in order: an offline pool is drawn from again and again."""
        every = (
            candidate
            for batch in self.batches()
            for candidate in _candidates(batch, self._file(batch).with_suffix(".safetensors"))
        )
        return sorted(every, key=lambda candidate: candidate.order)

    def find(self, ids: Iterable[str]) -> list[Candidate]:
        """The samples with these ids, in the order given."""
        by_id = {candidate.sample.id: candidate for candidate in self.everything()}
        return [by_id[name] for name in ids]

    # ------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside the files: the ids handed out, and those dropped as stale."""
        with self.changed:
            return {"used": sorted(self._used), "stale": sorted(self._stale)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a checkpoint: batches admitted since then are unused again."""
        with self.changed:
            self._used, self._stale = set(state["used"]), set(state["stale"])
            self._unused.clear()
            for batch in self._batches.values():
                self._enlist(batch)


def images(candidates: Sequence[Candidate]) -> list[np.ndarray]:
    """Pixels of candidates, each uint8 [H, W, 3] or a clip [M, H, W, 3], in the same order.

    Every file is read once, and checked.

    Raises:
        CheckpointCorrupt: a file of the run's folder is missing or was altered.
    """
    files = {candidate.file: candidate.sha256 for candidate in candidates}
    pixels = {path: _read(path, digest) for path, digest in files.items()}
    return [pixels[candidate.file][candidate.row] for candidate in candidates]


def each_image(candidates: Sequence[Candidate]) -> Iterator[tuple[int, np.ndarray]]:
    """As `images`, with the index of each, file by file: no more than one file is held at a time."""
    rows: dict[Path, list[int]] = {}
    for index, candidate in enumerate(candidates):
        rows.setdefault(candidate.file, []).append(index)
    for path, indices in rows.items():
        pixels = _read(path, candidates[indices[0]].sha256)
        yield from ((index, pixels[candidates[index].row]) for index in indices)


def image(candidate: Candidate) -> np.ndarray:
    """Pixels of one candidate, uint8 [H, W, 3] or [M, H, W, 3]; its file was checked before, and only its row is read.

    Raises:
        CheckpointCorrupt: the file is missing.
    """
    try:
        return codec.decode_row(candidate.file, "images", candidate.row)
    except FileNotFoundError as error:
        raise CheckpointCorrupt(f"{candidate.file} is missing: {ADVICE}") from error


def without_copies(candidates: Sequence[Candidate], drop: bool) -> tuple[list[Candidate], list[Candidate]]:
    """Candidates to use, and near copies of a real image among them, which are not used if `drop` says so."""
    copies = [candidate for candidate in candidates if drop and candidate.sample.near_copy]
    return [candidate for candidate in candidates if not (drop and candidate.sample.near_copy)], copies


Plain = list[tuple[str, str, int, str | None]]


def packed(candidates: Sequence[Candidate]) -> Plain:
    """Candidates as plain values, on the way to the other processes of a run."""
    return [(c.sample.model_dump_json(), str(c.file), c.row, c.sha256) for c in candidates]


def unpacked(plain: Plain) -> list[Candidate]:
    """The candidates that `packed` was given."""
    return [Candidate(Sample.model_validate_json(sample), Path(file), row, sha) for sample, file, row, sha in plain]


def _candidates(batch: SampleBatch, file: Path) -> list[Candidate]:
    digest = batch.blob.sha256 if batch.blob is not None else None
    return [Candidate(sample, file, row, digest) for row, sample in enumerate(batch.samples)]


def _read(path: Path, digest: str | None) -> np.ndarray:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointCorrupt(f"{path} is missing: {ADVICE}") from error
    if digest is not None and codec.digest(data) != digest:
        raise CheckpointCorrupt(f"{path} was altered: {ADVICE}")
    return codec.decode(data)["images"]
