"""Files that survive a crash: once `write_durably` returns the file is on disk, whole; before that, it is not there."""

from __future__ import annotations

import os
from pathlib import Path

from protocol.disk import full_disk_told

PARTIAL = ".partial"
ADVICE = (
    "free some, or move the run's folder to a larger disk; then start the same command again to go on from the last "
    "checkpoint"
)


def write_durably(path: Path, data: bytes) -> None:
    """Write beside the target, flush to the disk, rename, and flush the folder.

    Raises:
        DiskFull: the target is as it was.
    """
    partial = path.with_name(path.name + PARTIAL)
    with full_disk_told(path, ADVICE):
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def remove_partial(folder: Path) -> None:
    """Remove what writers that were killed left unfinished, in a folder and below it. Nobody may be writing there."""
    for partial in folder.rglob("*" + PARTIAL):
        partial.unlink()
