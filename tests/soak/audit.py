"""What must be true after a soak, worked out anew from files and the broker, without the product's own bookkeeping."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from protocol.broker import connect
from protocol.messages import sample_id

STALENESS = 1  # K of the scene


def complaints(folder: Path, broker: str, iterations: int, poisoned: int) -> list[str]:
    """What is wrong with a finished run; empty when nothing is.

    Args:
        folder: the run's. iterations: that it has to have. poisoned: dead letters of other runs.
    """
    return [*_run(folder, iterations), *_samples(folder), *_broker(broker, folder, poisoned)]


def _rows(path: Path) -> list[dict[str, Any]]:
    """Raises ValueError for a line cut short."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _documents(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def _run(folder: Path, iterations: int) -> Iterator[str]:
    done = [row["iteration"] for row in _rows(folder / "metrics.jsonl")]
    if done != list(range(iterations)):
        yield f"metrics.jsonl has iterations {done}, not each of {iterations} once"
    if left := [str(path) for path in folder.rglob("*.partial")]:
        yield f"unfinished files are left: {left}"
    for name in ("events.jsonl", "trace.jsonl"):
        _rows(folder / name)


def _samples(folder: Path) -> Iterator[str]:
    """Each sample that a question names has come, or is known to have failed; it was used once at most, in time."""
    asked = {
        sample_id(feedback["run"], feedback["feedback"], sample["sample_id"], index): feedback["feedback"]
        for feedback in _documents(folder / "feedback")
        for sample in feedback["samples"]
        for index in range(4)  # agent.images_per_sample of the scene
    }
    came, failed = Counter(), Counter()
    for batch in _documents(folder / "batches"):
        came.update(sample["id"] for sample in batch["samples"])
        failed.update(batch["missing"])
        pixels = folder / "batches" / f"{batch['feedback']:06d}-{batch['unit']:06d}.safetensors"
        if batch["samples"] and not pixels.exists():
            yield f"{pixels} is missing"
    if came + failed != Counter(asked.keys()):
        lost, more = Counter(asked.keys()) - (came + failed), (came + failed) - Counter(asked.keys())
        yield f"of {len(asked)} samples asked for, {lost.total()} neither came nor failed; {more.total()} came beside"
    used = _rows(folder / "selection.jsonl")
    twice = [name for name, times in Counter(row["id"] for row in used).items() if times > 1]
    if twice:
        yield f"{len(twice)} samples were used twice, such as {twice[0]}"
    for row in used:
        age = row["iteration"] - asked.get(row["id"], -1000)
        if age < 0 or (row["kept"] and age > STALENESS):
            yield f"sample {row['id']} was used in iteration {row['iteration']} at age {age}"


def _broker(url: str, folder: Path, poisoned: int) -> Iterator[str]:
    """Nothing is left but the markers, and the dead letters are those that the run knows of."""
    with connect(url) as client:
        for stream in (b"work", *client.keys("batches:*")):
            if left := client.xlen(stream):
                yield f"{left} entries are left on {stream.decode()}"
            for group in client.xinfo_groups(stream):
                if group["pending"]:
                    yield f"{group['pending']} entries of {stream.decode()} are pending in {group['name'].decode()}"
        if blobs := client.keys("blob:*"):
            yield f"{len(blobs)} blobs are left, such as {blobs[0].decode()}"
        dead = client.xlen("dead")
    failed = sum(batch["error"] is not None for batch in _documents(folder / "batches"))
    if dead != failed + poisoned:
        yield f"{dead} dead letters, but {failed} failed units of the run and {poisoned} poisoned ones"
