"""Runs the processes of one machine as children: started in order, kept alive, stopped in reverse, none left behind.

Each child sits in a session of its own, so that Ctrl-C reaches only this process, which then stops them in order; and
holds a pipe from it as standard input, so that it stops by itself when this process is killed. A child that dies is
started again, with a pause that grows while it keeps dying early. One that is merely stopped (SIGSTOP) is left alone.
Knows nothing of what the children do.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType

from protocol.parent import TEMPORARY

log = logging.getLogger("onthefly")

STOP_S = 15.0  # that a child has to stop in, before it is killed
FIRST_PAUSE_S = 0.5  # before a child that died is started again; doubles with each early death in a row
LONGEST_PAUSE_S = 30.0
SETTLED_S = 60.0  # a child that dies sooner after its start died early
EARLY_DEATHS = 6  # in a row, at which it is given up

Final = Callable[[int], bool]  # exit status, negative for a signal -> whether the child is not to be started again


def job_is_over(status: int) -> bool:
    """For a child with an end: done, one of our errors, wrong settings and interrupted are what a new start would not
    change. A signal, the status of an exception that nobody expected, and that of an error that may pass are others."""
    return status in (0, 1, 2, 130)


def service_is_over(status: int) -> bool:
    """For a child that is to be there until it is stopped: never."""
    return False


class Backoff:
    """How soon a child that died is started again, and when it is given up."""

    def __init__(self) -> None:
        self._early_deaths = 0  # in a row

    def died(self, lived_s: float, *, may_pass: bool = False) -> float | None:
        """Seconds to wait before the next start; None: give it up.

        Args:
            may_pass: it said that what it died of may pass.
        """
        self._early_deaths = self._early_deaths + 1 if lived_s < SETTLED_S else 0
        if self._early_deaths >= EARLY_DEATHS and not may_pass:
            return None
        return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** max(0, self._early_deaths - 1))


class Child:
    """A child process, through all its lives.

    Args:
        log: file that gets what it says on standard error; None: this process's own standard error does.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path | None = None):
        self.name = name
        self._command, self._environment, self._log = list(command), {**os.environ, **environment}, log
        self._stopping = threading.Event()
        self._starting = threading.Lock()  # so that nothing is started once it is stopping
        self._keeper: threading.Thread | None = None
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        self._started = time.monotonic()
        with self._log.open("ab") if self._log else nullcontext() as errors:
            return subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stderr=errors, start_new_session=True, env=self._environment
            )

    @property
    def running(self) -> bool:
        """Whether it runs now."""
        return self.process.poll() is None

    @property
    def ended(self) -> bool:
        """Whether it has ended for good."""
        return not (self._keeper.is_alive() if self._keeper is not None else self.running)

    def keep(self, is_over: Final) -> None:
        """From now on start it again when it dies, unless `is_over` says of its status that it is not to be."""
        self._keeper = threading.Thread(target=self._keep, args=(is_over,), name=f"keep-{self.name}", daemon=True)
        self._keeper.start()

    def _keep(self, is_over: Final) -> None:
        backoff = Backoff()
        while not is_over(status := self.process.wait()) and not self._stopping.is_set():
            self._clear_up()
            pause = backoff.died(time.monotonic() - self._started, may_pass=status == TEMPORARY)
            if pause is None:
                log.error(
                    "%s died %d times in a row soon after its start, the last time because %s. It is given up: its "
                    "log above says more; mend that, and start the same command again",
                    self.name,
                    EARLY_DEATHS,
                    _cause(status),
                )
                return
            log.warning("%s died: %s; it is started again in %.1f s", self.name, _cause(status), pause)
            self._stopping.wait(pause)
            with self._starting:
                if self._stopping.is_set():
                    return
                self.process = self._start()
            log.info("%s is started again", self.name)

    def _clear_up(self) -> None:
        """After a death: what it started itself may hold its files and ports."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Its exit status once it has ended for good, as a shell tells it: 128 + n for signal n."""
        if self._keeper is not None:
            self._keeper.join()
        status = self.process.wait()
        return status if status >= 0 else 128 - status

    def stop(self) -> None:
        """Ask it to stop; kill it when it does not."""
        with self._starting:
            self._stopping.set()
        if self.running:
            self.process.send_signal(signal.SIGTERM)
            self.process.send_signal(signal.SIGCONT)  # a stopped process gets no other signal
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            log.warning("%s did not stop in %.0f s and is killed", self.name, STOP_S)
            self.process.kill()
            self.process.wait()
        if self._keeper is not None:
            self._keeper.join()
        assert self.process.stdin is not None
        self.process.stdin.close()


def _cause(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"


class Supervisor:
    """A context: leaving it, however, stops every child, the last one first."""

    def __init__(self) -> None:
        self.children: list[Child] = []

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for child in reversed(self.children):
            child.stop()

    def start(
        self, name: str, module: str, arguments: Sequence[str], environment: Mapping[str, str], log: Path | None = None
    ) -> Child:
        """Start `python -m module arguments --exit-with-parent` with additions to the environment. See `Child`."""
        command = [sys.executable, "-m", module, *arguments, "--exit-with-parent"]
        child = Child(name, command, environment, log)
        self.children.append(child)
        return child
