from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from generator_service.turns import turn
from protocol.errors import Cancelled

NEVER = threading.Event()
HOLDER = """
import sys, threading, pathlib
from generator_service.turns import turn
with turn(pathlib.Path(sys.argv[1]), threading.Event()):
    print("mine", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "turn"


def holder(path: Path) -> subprocess.Popen:
    """Another process, whose turn it is."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "mine\n"
    return process


def test_threads_have_it_one_at_a_time_and_leave_nothing(path: Path):
    inside, most, done = [], [], []

    def take(number: int) -> None:
        with turn(path, NEVER):
            inside.append(number)
            most.append(len(inside))
            time.sleep(0.01)
            inside.remove(number)
        done.append(number)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(done) == list(range(6)) and set(most) == {1} and not path.exists()


@pytest.mark.parametrize("how", ["ends", "is killed"])
def test_another_process_has_it_until_it_is_over(path: Path, how: str):
    other = holder(path)
    entered = threading.Event()

    def take() -> None:
        with turn(path, NEVER):
            entered.set()

    waiting = threading.Thread(target=take)
    waiting.start()
    assert not entered.wait(0.5)
    other.communicate() if how == "ends" else other.kill()
    assert entered.wait(30)
    waiting.join(30)
    other.communicate()


def test_one_who_waits_can_be_told_to_stop(path: Path):
    cancelled = threading.Event()
    with turn(path, NEVER):
        threading.Timer(0.1, cancelled.set).start()
        with pytest.raises(Cancelled), turn(path, cancelled):
            raise AssertionError("it is another's turn")
    with turn(path, cancelled):  # nobody to wait for
        pass


def test_what_goes_wrong_in_a_turn_ends_it(path: Path):
    with pytest.raises(ZeroDivisionError), turn(path, NEVER):
        raise ZeroDivisionError
    assert not path.exists()
