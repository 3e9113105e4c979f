"""Files that grow by lines of JSON, as what takes long to find is found: what was written stays when the process is
killed. Knows nothing of what the lines mean."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from protocol.disk import full_disk_told


def read(path: Path) -> list[Any]:
    """The values, in order; a line that was cut off when its process was killed is left out. No file: none."""
    if not path.exists():
        return []
    found = []
    for line in path.read_bytes().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:  # cut off, or the empty line before those of another call
            continue
    return found


def append(path: Path, values: Sequence[Any]) -> None:
    """A line each, to the disk; its folder is made when missing. Begins with a line break, so that what others wrote
    half does not spoil it. Raises DiskFull."""
    if not values:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(f"\n{json.dumps(value)}" for value in values) + "\n"
    with full_disk_told(path), path.open("ab") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
