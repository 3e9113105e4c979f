"""Weight sets that a tune job publishes while it goes on: written whole, and found again after a crash.

A set is a folder and a file beside it that says what it is. Whoever publishes the set takes the folder away; what is
left of those that died before that is told anew. Knows nothing of versions or of who is served.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from generator_service.backends.interface import Made
from protocol.disk import full_disk_told
from protocol.errors import DiskFull

log = logging.getLogger(__name__)
PREFIX, PARTIAL = "set-", "partial-set"

Write = Callable[[Path], tuple[str, dict[str, Any]]]
"""Writes the tensors into an empty folder; returns kind and metadata."""


def write(unfinished: Path, step: int, save: Write) -> Made | None:
    """Write the set of a step. None: there is one already, which is being published; or there is no room, and the log
    says so."""
    partial, folder = unfinished / PARTIAL, _folder(unfinished, step)
    if folder.exists():
        return None  # told by `left`; of the same step of the same job, it is the same
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with full_disk_told(partial, "free some; the tuning goes on without this weight set"):
            partial.mkdir(parents=True)
            kind, metadata = save(partial)
            _told(folder).write_text(json.dumps({"kind": kind, "metadata": metadata}))
    except DiskFull as error:
        shutil.rmtree(partial, ignore_errors=True)
        log.warning("%s", error.message, extra={"event": "disk_full"})
        return None
    partial.rename(folder)
    return Made(folder, kind, metadata)


def left(unfinished: Path) -> list[Made]:
    """Sets that were written, in their order, and that nobody took."""
    folders = sorted(path for path in unfinished.glob(f"{PREFIX}*") if path.is_dir())
    return [Made(folder, **json.loads(_told(folder).read_text())) for folder in folders]


def _folder(unfinished: Path, step: int) -> Path:
    return unfinished / f"{PREFIX}{step:07d}"


def _told(folder: Path) -> Path:
    return folder.with_suffix(".json")
