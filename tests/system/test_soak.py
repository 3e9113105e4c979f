"""A short soak, and what it says of a trainer that takes every delivery for a new one. `make soak` is the long one.

Each soak is a process of its own, which starts, kills and audits the others; both run side by side.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

UNACKED = ["--at", "before-ack:2"]  # the trainer is killed between admission and acknowledgement
SOAKS = {
    "storm": ["--kills", "12", "--seed", "1", *UNACKED],
    "without de-duplication": ["--kills", "0", "--without-dedup", *UNACKED],
}


@pytest.fixture(scope="module")
def soaks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, subprocess.Popen[str]]]:
    started = {}
    for name, arguments in SOAKS.items():
        folder = tmp_path_factory.mktemp("soak")
        command = [sys.executable, "-m", "tests.soak", *arguments, "--folder", str(folder), "--timeout", "90"]
        started[name] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    yield started
    for process in started.values():
        process.kill()
        process.wait()
        process.stdout.close()


def outcome(process: subprocess.Popen[str]) -> tuple[int, str]:
    said, _ = process.communicate()
    return process.returncode, said


def test_everything_is_accounted_for_after_a_storm(soaks: dict[str, subprocess.Popen[str]]):
    status, said = outcome(soaks["storm"])
    assert status == 0, said
    assert int(said.split()[0]) >= 12
    assert re.search(r"before-ack [1-9]", said)  # what was delivered again was trained on once


def test_without_de_duplication_the_books_do_not_balance(soaks: dict[str, subprocess.Popen[str]]):
    """The one fault is a kill after which a batch is delivered again; nothing else is wrong with this run."""
    status, said = outcome(soaks["without de-duplication"])
    assert status == 1, said
    assert "before-ack 1" in said
    assert "problem: answered twice" in said
    assert "was decided on more than once" in said
    assert "NOT balanced" in said
    assert "samples were used twice" in said  # the audit's own finding
