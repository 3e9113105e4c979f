"""A full disk as an error of ours. Knows nothing of what is written."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from protocol.errors import DiskFull


@contextmanager
def full_disk_told(path: Path, advice: str = "free some") -> Iterator[None]:
    """Raises DiskFull where the block finds no room for `path`; `advice` says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFull(f"there is no room left to write {path} ({error.strerror}): {advice}") from error
