"""How a process of ours ends: on a signal, and never later than its parent.

The parent gives the child a pipe as standard input and never writes to it: end of file means that the parent is gone,
however it died. Knows nothing of what parent and child do.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

CRASHED = 70  # exit status after an exception that is none of our errors
TEMPORARY = 75  # exit status after an error that may pass: a new start may go better
GRACE_S = 10.0  # between asking this process to stop and stopping it


def interruptible() -> None:
    """SIGINT and SIGTERM raise KeyboardInterrupt in the main thread, also when a shell started this process in the
    background, with SIGINT ignored."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


def exit_with_parent() -> None:
    """Interrupt this process when its standard input closes; end it if it has not stopped within the grace time."""
    threading.Thread(target=_watch, name="parent", daemon=True).start()


def _watch() -> None:
    # not sys.stdin.buffer: its lock, held here while waiting, would abort the interpreter at exit
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait(GRACE_S)
    os._exit(1)
