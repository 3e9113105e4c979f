"""Runs the processes of one machine as children: started in order, stopped in reverse, none left behind.

Each child sits in a session of its own, so that Ctrl-C reaches only this process, which then stops them in order; and
holds a pipe from it as standard input, so that it stops by itself when this process is killed. Knows nothing of what
the children do.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from types import TracebackType

log = logging.getLogger("onthefly")

STOP_S = 15.0  # that a child has to stop in, before it is killed


class Child:
    """A running child process."""

    def __init__(self, name: str, process: subprocess.Popen[bytes]):
        self.name, self.process = name, process

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def wait(self) -> int:
        """Its exit status, once it has ended by itself."""
        return self.process.wait()

    def stop(self) -> None:
        """Ask it to stop; kill it when it does not."""
        if self.running:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            log.warning("%s did not stop in %.0f s and is killed", self.name, STOP_S)
            self.process.kill()
            self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()


class Supervisor:
    """A context: leaving it, however, stops every child, the last one first."""

    def __init__(self) -> None:
        self.children: list[Child] = []

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for child in reversed(self.children):
            child.stop()

    def start(self, name: str, module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> Child:
        """Start `python -m module arguments --exit-with-parent` with additions to the environment."""
        command = [sys.executable, "-m", module, *arguments, "--exit-with-parent"]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, start_new_session=True, env={**os.environ, **environment}
        )
        child = Child(name, process)
        self.children.append(child)
        return child
