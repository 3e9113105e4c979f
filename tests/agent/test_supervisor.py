"""Children are kept alive, stopped in order, and none outlives its parent, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agent import supervisor as supervision
from agent.supervisor import Backoff, Child, Supervisor, job_is_over, service_is_over

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


BRIEF = """
import os, subprocess, sys, time
from pathlib import Path
with Path(sys.argv[1]).open("a") as file:
    file.write(f"{os.getpid()}\\n")
if sys.argv[2] == "leaves one behind":
    orphan = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    Path(sys.argv[1] + ".orphan").write_text(str(orphan.pid))
    os.kill(os.getpid(), 9)
sys.exit(int(sys.argv[2]))
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "child.py").write_text(CHILD)
    (tmp_path / "brief.py").write_text(BRIEF)
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


def test_what_a_child_says_is_kept_in_its_log_through_all_its_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(supervision, "FIRST_PAUSE_S", 0.01)
    (tmp_path / "loud.py").write_text("import os, sys; print('alive', file=sys.stderr, flush=True); os.abort()")
    with Supervisor() as supervisor:
        environment = {"PYTHONPATH": str(tmp_path)}
        child = supervisor.start("loud", "loud", [], environment, tmp_path / "loud.log")
        child.keep(job_is_over)
        child.wait()
    said = (tmp_path / "loud.log").read_text().splitlines()
    assert said.count("alive") == supervision.EARLY_DEATHS


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


# ---------------------------------------------------------------- kept alive


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(supervision, "EARLY_DEATHS", 3)


def test_pauses_double_up_to_the_longest_and_start_over_after_a_settled_life():
    backoff = Backoff()
    assert [backoff.died(1.0) for _ in range(5)] == [0.5, 1.0, 2.0, 4.0, 8.0]
    assert backoff.died(60.0) == 0.5
    assert [backoff.died(1.0) for _ in range(5)] == [0.5, 1.0, 2.0, 4.0, 8.0]
    assert backoff.died(59.0) is None
    assert backoff.died(1.0, may_pass=True) == 30.0


def test_no_pause_is_longer_than_the_longest(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(supervision, "EARLY_DEATHS", 20)
    backoff = Backoff()
    assert [backoff.died(0.0) for _ in range(9)][5:] == [16.0, 30.0, 30.0, 30.0]


def test_a_killed_child_is_started_again_and_each_death_is_told_once(
    tmp_path: Path, environment: dict[str, str], caplog: pytest.LogCaptureFixture, quick: None
):
    log = tmp_path / "log"
    with Supervisor() as supervisor:
        child = supervisor.start("a", "child", [str(log), "a", "polite"], environment)
        child.keep(service_is_over)
        for lives in (1, 2):
            wait_until(lambda lives=lives: lines(log).count("a started") == lives)
            os.kill(child.process.pid, signal.SIGKILL)
        wait_until(lambda: lines(log).count("a started") == 3)
        assert child.running and not child.ended
    assert lines(log)[-1] == "a stopped"
    assert caplog.text.count("a died: signal SIGKILL; it is started again") == 2


@pytest.mark.parametrize("status", [0, 1, 2, 130])
def test_a_job_that_ended_for_a_reason_is_over(tmp_path: Path, environment: dict[str, str], status: int, quick: None):
    with Supervisor() as supervisor:
        child = supervisor.start("a", "brief", [str(tmp_path / "log"), str(status)], environment)
        child.keep(job_is_over)
        assert child.wait() == status
        assert child.ended
    assert len(lines(tmp_path / "log")) == 1


@pytest.mark.parametrize(("over", "status"), [(job_is_over, 70), (service_is_over, 0), (service_is_over, 2)])
def test_a_child_that_keeps_dying_early_is_given_up(
    tmp_path: Path, environment: dict[str, str], caplog: pytest.LogCaptureFixture, quick: None, over, status: int
):
    with Supervisor() as supervisor:
        child = supervisor.start("a", "brief", [str(tmp_path / "log"), str(status)], environment)
        child.keep(over)
        assert child.wait() == status
    assert len(lines(tmp_path / "log")) == 3
    assert caplog.text.count("is started again in") == 2
    assert f"a died 3 times in a row soon after its start, the last time because status {status}" in caplog.text


def test_what_a_dead_child_started_goes_too(tmp_path: Path, environment: dict[str, str], quick: None):
    with Supervisor() as supervisor:
        child = supervisor.start("a", "brief", [str(tmp_path / "log"), "leaves one behind"], environment)
        child.keep(job_is_over)
        assert child.wait() == 128 + signal.SIGKILL
    orphan = int((tmp_path / "log.orphan").read_text())
    wait_until(lambda: not alive(orphan))


def test_a_stopped_child_is_left_alone_and_can_still_be_asked_to_stop(
    tmp_path: Path, environment: dict[str, str], quick: None
):
    log = tmp_path / "log"
    with Supervisor() as supervisor:
        child: Child = supervisor.start("a", "child", [str(log), "a", "polite"], environment)
        child.keep(service_is_over)
        wait_until(lambda: "a started" in lines(log))
        pid = child.process.pid
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.3)
        assert child.process.pid == pid and child.running
    assert lines(log) == ["a started", "a stopped"]
