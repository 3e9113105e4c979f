"""Checkpoints of an adaptation that is not done, so that its process may die.

One file holds all of a checkpoint. Its name carries a hash of its bytes and of what the adaptation is, so that neither
a damaged file nor one of another adaptation is ever read. Knows nothing of what the state means.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from protocol.disk import full_disk_told
from protocol.errors import DiskFull

log = logging.getLogger(__name__)
PARTIAL = "partial"  # what is being written


def save(folder: Path, step: int, state: Mapping[str, Any], identity: str) -> None:
    """Write a checkpoint in place of the one before, which goes once this one is on the disk; without room for it the
    one before stays, and the log says so.

    Args:
        folder: made when missing. step: names the file.
        state: tensors, numbers, strings and None, and lists and dicts of them.
        identity: what the adaptation is: only who says the same reads the checkpoint.
    """
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    data = buffer.getvalue()
    path = folder / f"checkpoint-{step:07d}-{_digest(data, identity)}.pt"
    partial = folder / PARTIAL
    with spared_when_full(partial):
        folder.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        for other in folder.glob("checkpoint-*"):
            if other != path:
                other.unlink(missing_ok=True)


@contextmanager
def spared_when_full(path: Path) -> Iterator[None]:
    """A disk without room costs what the block writes to `path`, and not the adaptation; the log says so."""
    try:
        with full_disk_told(path, "free some; the adaptation goes on without this file"):
            yield
    except DiskFull as error:
        path.unlink(missing_ok=True)
        log.warning("%s", error.message, extra={"event": "disk_full"})


def load(folder: Path, identity: str) -> dict[str, Any] | None:
    """The newest checkpoint of this adaptation, its tensors on the CPU; None, and a line in the log when there are
    only others, to begin anew."""
    found = sorted(folder.glob("checkpoint-*.pt"), reverse=True)
    for path in found:
        data = path.read_bytes()
        if path.stem.split("-")[-1] == _digest(data, identity):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if found:
        log.warning("%s is damaged or of another adaptation: this one begins anew", found[0])
    return None


def _digest(data: bytes, identity: str) -> str:
    return hashlib.sha256(identity.encode() + b"\0" + data).hexdigest()[:32]
