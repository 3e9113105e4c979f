"""Children are stopped in order, and none outlives its parent, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agent.supervisor import Supervisor

CHILD = """
import signal, sys, time
from pathlib import Path
from protocol.parent import exit_with_parent

log = Path(sys.argv[1])
def stop(*_):
    with log.open("a") as file:
        file.write(f"{sys.argv[2]} stopped\\n")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop if sys.argv[3] == "polite" else signal.SIG_IGN)
exit_with_parent()
with log.open("a") as file:
    file.write(f"{sys.argv[2]} started\\n")
while True:
    time.sleep(0.05)
"""
PARENT = """
import sys, time
from agent.supervisor import Supervisor
from protocol.parent import interruptible
interruptible()
with Supervisor() as supervisor:
    child = supervisor.start("a", "child", [sys.argv[1], "a", "polite"], {"PYTHONPATH": sys.argv[2]})
    print(child.process.pid, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "child.py").write_text(CHILD)
    return {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])}


def lines(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def wait_until(condition, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not (state.exists() and state.read_text().split()[2] == "Z")


def test_stopped_last_first(tmp_path: Path, environment: dict[str, str]):
    log = tmp_path / "log"
    with Supervisor() as supervisor:
        for name in ("a", "b"):
            supervisor.start(name, "child", [str(log), name, "polite"], environment)
            wait_until(lambda name=name: f"{name} started" in lines(log))
    assert lines(log)[2:] == ["b stopped", "a stopped"]
    assert not any(child.running for child in supervisor.children)


def test_a_stubborn_child_is_killed(tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("agent.supervisor.STOP_S", 0.3)
    log = tmp_path / "log"
    with Supervisor() as supervisor:
        child = supervisor.start("a", "child", [str(log), "a", "stubborn"], environment)
        wait_until(lambda: "a started" in lines(log))
    assert child.process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_no_child_outlives_its_parent(tmp_path: Path, environment: dict[str, str], how: signal.Signals):
    log = tmp_path / "log"
    command = [sys.executable, "-c", PARENT, str(log), environment["PYTHONPATH"]]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ, **environment}
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        wait_until(lambda: "a started" in lines(log))
        parent.send_signal(how)
        wait_until(lambda: not alive(pid))
    assert lines(log)[-1] == "a stopped"
