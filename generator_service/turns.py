"""One at a time, among all processes that share a folder. Knows nothing of what is done in a turn."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from protocol.errors import Cancelled

LOOK_S = 0.2  # between two looks whether it is our turn


@contextmanager
def turn(path: Path, cancelled: threading.Event) -> Iterator[None]:
    """Wait for the turn, which lasts while the block runs; one whose process dies is over.

    Args:
        path: of a file that is there meanwhile.

    Raises Cancelled when that was asked for while others had theirs.
    """
    while True:
        with path.open("w") as lock:
            while not _taken(lock):
                if cancelled.wait(LOOK_S):
                    raise Cancelled("cancelled: ask again if you still want it")
            if not _is_at(path, lock):
                continue  # whoever had it before took the file away
            try:
                yield
            finally:
                path.unlink()
            return


def _taken(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(path: Path, lock: IO[str]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(lock.fileno()))
    except FileNotFoundError:
        return False
