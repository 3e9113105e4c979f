"""The soak's processes: each is started again when it dies, and none outlives the soak (on Linux).

Python processes are forked from the soak, which has loaded their libraries, so that a start takes tenths of a second
and many kills fit into a minute; from there on they are what `python -m` would have started. Knows nothing of when and
why they are killed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from agent.supervisor import job_is_over
from tests.soak import failpoints

_PR_SET_PDEATHSIG = 1  # prctl: the signal that a process gets when its parent dies
REST_S = 0.5  # before a process that failed by itself is started again


@dataclass
class Member:
    """One process, through all its lives."""

    name: str
    run: Callable[[str | None], None]  # in the new process, to die at a named point if there is one; need not return
    log: Path
    pid: int | None = None  # None: not running
    armed: str | None = None  # the named point at which the present life is to end
    lives: int = 0
    not_before: float = 0.0  # monotonic: of the next life
    done: bool = False  # ended so that a supervisor would not start it again

    def start(self, at: str | None = None) -> None:
        self.armed, self.lives = at, self.lives + 1
        self.pid = os.fork()
        if self.pid == 0:
            _become(self.run, at, self.log)

    def signal(self, number: int) -> None:
        """Has no effect on a process that is gone."""
        if self.pid is not None:
            os.kill(self.pid, number)  # a zombie until it is reaped, so the id is still its own

    def reap(self) -> int | None:
        """Exit status of a life that has ended, negative for a signal; None: it runs, or none was running."""
        if self.pid is None:
            return None
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid == 0:
            return None
        self.pid = None
        return os.waitstatus_to_exitcode(status)

    def stop(self, grace_s: float = 20.0) -> int | None:
        """Ask it to stop, and kill it when it does not; its exit status."""
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        while self.pid is not None:
            if (status := self.reap()) is not None:
                return status
            if time.monotonic() > deadline:
                self.signal(signal.SIGKILL)
            time.sleep(0.02)
        return None


@dataclass
class Death:
    """The end of one life."""

    member: str
    status: int  # negative: the signal
    point: str | None  # the named point at which it killed itself; None: it was killed from outside, or failed


@dataclass
class Fleet:
    """All processes, in the order in which they are started; stopped in reverse."""

    hits: Path  # written by `failpoints`
    members: dict[str, Member] = field(default_factory=dict)

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        for member in reversed(self.members.values()):
            member.stop()

    def add(self, name: str, run: Callable[[str | None], None], folder: Path) -> Member:
        self.members[name] = Member(name, run, folder / f"{name}.log")
        return self.members[name]

    def reap(self) -> list[Death]:
        """Who died since the last look. Whoever failed by itself is given a rest before it may be started again."""
        deaths = []
        for member in self.members.values():
            pid, status = member.pid, member.reap()
            if status is None:
                continue
            deaths.append(Death(member.name, status, self._point(pid)))
            member.done = status == 0 or (member.name == "trainer" and job_is_over(status))
            if status > 0:
                member.not_before = time.monotonic() + REST_S
        return deaths

    def startable(self) -> list[Member]:
        """Who is not running and ought to."""
        now = time.monotonic()
        return [m for m in self.members.values() if m.pid is None and not m.done and now >= m.not_before]

    def _point(self, pid: int | None) -> str | None:
        lines = self.hits.read_text().splitlines() if self.hits.exists() else []
        return next((line.split()[1] for line in lines if line.split()[0] == str(pid)), None)


def module(name: str, arguments: Sequence[str], hits: Path, flags: Sequence[str] = ()) -> Callable[[str | None], None]:
    """What `python -m name arguments` runs, with a named point at which to die."""

    def run(at: str | None) -> None:
        point = ["--at", at] if at else []
        failpoints.main([*point, "--log", str(hits), *flags, name, "--", *arguments])

    return run


def program(command: Sequence[str]) -> Callable[[str | None], None]:
    """Another program, without named points."""
    return lambda at: os.execv(command[0], list(command))


def _become(run: Callable[[str | None], None], at: str | None, log: Path) -> None:
    """What a forked child does; never returns."""
    status = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
        os.setsid()
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(out, stream.fileno())
        run(at)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
