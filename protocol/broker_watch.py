"""Keeps one broker server alive for as long as its parent lives, and leaves nothing behind.

A program of its own, started by path: `python -I broker_watch.py FOLDER PARENT_PID BINARY`. Standard library only, so
that it starts at once. Its standard input is a pipe that nobody writes to: end of file means that the parent is gone,
however it died. On Linux the server dies with this program even when that is killed; the folder then stays in the
system's temporary folder. It knows nothing of what the server stores.
"""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

POLL_S = 0.2  # how often the parent and the server are looked at
GRACE_S = 5.0  # between asking the server to stop and killing it
SETTLED_S = 2.0  # a server that dies sooner than this after its start died early
EARLY_DEATHS = 3  # in a row, after which it is given up
_PR_SET_PDEATHSIG = 1  # prctl: the signal that a process gets when its parent dies


def watch(folder: Path, parent: int, binary: str) -> None:
    """Run the server until the parent is gone; start it again when it dies; remove the folder at the end.

    A server that keeps dying early is given up: the end of its log goes to standard output.
    """
    early_deaths = 0
    try:
        while early_deaths < EARLY_DEATHS:
            started = time.monotonic()
            if _serve(folder, parent, binary):
                return
            early_deaths = early_deaths + 1 if time.monotonic() - started < SETTLED_S else 0
        print((folder / "server.log").read_text(errors="replace")[-2000:])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _serve(folder: Path, parent: int, binary: str) -> bool:
    """Run the server once. True when it was stopped because the parent is gone, False when it died by itself."""
    with (folder / "server.log").open("ab") as log:
        command = [binary, str(folder / "server.conf")]
        server = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder, preexec_fn=_dies_with_this_process()
        )
    try:
        while server.poll() is None:
            if _parent_gone(parent):
                return True
        return False
    finally:
        _stop(server)


def _dies_with_this_process() -> Callable[[], None] | None:
    """What a child calls before it becomes the server, where the system can tie it to its parent."""
    if sys.platform != "linux":
        return None
    prctl, watcher = ctypes.CDLL(None).prctl, os.getpid()

    def tie() -> None:
        prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
        if os.getppid() != watcher:  # it died before it was tied to
            os._exit(1)

    return tie


def _parent_gone(parent: int) -> bool:
    """Waits up to POLL_S. The parent's forked children may hold the pipe open, so its death is also seen by its id."""
    readable, _, _ = select.select([sys.stdin], [], [], POLL_S)
    return bool(readable) or os.getppid() != parent


def _stop(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def _leave(signum: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signum, signal.SIG_IGN)
    sys.exit(128 + signum)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _leave)
    watch(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
