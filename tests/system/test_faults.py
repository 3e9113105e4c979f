"""Processes are killed and frozen, and what they had in hand is done by others, once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tomli_w

from protocol.bus import Bus, BusConfig
from tests.protocol.messages_to_send import reply, unit
from tests.system.test_cli import alive, descendants, onthefly
from tests.system.whole import trainer_config
from trainer import record

LEASE_S = 0.5
WORKER = """
import sys, time
from protocol.bus import Bus, BusConfig
from tests.protocol.messages_to_send import batch, pixels

url, name, lease_s, work_s = sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4])
bus = Bus(url, BusConfig(lease_idle_s=lease_s))
bus.depths()
print("looks", flush=True)
while True:
    delivery = bus.claim_work(name, 0.1)
    if delivery is None:
        continue
    with bus.lease(delivery):
        print("claimed", delivery.message.unit, delivery.deliveries, flush=True)
        time.sleep(work_s)
        published = bus.finish_work(delivery, batch(delivery), pixels(delivery))
    print("published" if published else "late", delivery.message.unit, flush=True)
"""
ROOT = Path(__file__).parents[2]


@contextmanager
def worker(url: str, name: str, work_s: float) -> Iterator[subprocess.Popen[str]]:
    """A process that works as a replica does, without a model."""
    command = [sys.executable, "-c", WORKER, url, name, str(LEASE_S), str(work_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            yield process
        finally:
            process.kill()


def says(process: subprocess.Popen[str]) -> list[str]:
    assert process.stdout is not None
    return process.stdout.readline().split()


@pytest.fixture
def bus(broker: str) -> Iterator[Bus]:
    made = Bus(broker, BusConfig(lease_idle_s=LEASE_S))
    made.publish_plan("r", 0, "print", [unit()], {}, reply())
    yield made
    made.close()


def answers(bus: Bus) -> list[str]:
    """The workers of all batches."""
    found = []
    while (delivery := bus.next_batch("r", "trainer", 0.1)) is not None:
        found.append(delivery.message.worker)
        bus.ack_batch(delivery)
    return found


def test_a_killed_workers_unit_is_taken_over_after_its_lease(bus: Bus, broker: str):
    with worker(broker, "first", 60.0) as first:
        assert [says(first), says(first)] == [["looks"], ["claimed", "0", "1"]]
        with worker(broker, "second", 0.0) as second:
            assert says(second) == ["looks"]
            time.sleep(2 * LEASE_S)  # a renewed lease is respected
            assert bus.depths()["in_work"] == 1 and answers(bus) == []
            first.send_signal(signal.SIGKILL)
            assert says(second) == ["claimed", "0", "2"]
            assert says(second) == ["published", "0"]
    assert answers(bus) == ["second"]


def test_a_worker_that_was_frozen_past_its_lease_publishes_nothing(bus: Bus, broker: str):
    with worker(broker, "first", 0.3) as first:
        assert [says(first), says(first)] == [["looks"], ["claimed", "0", "1"]]
        first.send_signal(signal.SIGSTOP)
        with worker(broker, "second", 0.0) as second:
            assert [says(second), says(second)] == [["looks"], ["claimed", "0", "2"]]
            assert says(second) == ["published", "0"]
        first.send_signal(signal.SIGCONT)
        assert says(first) == ["late", "0"]
    assert answers(bus) == ["second"]


# ---------------------------------------------------------------- a whole machine


@pytest.fixture
def settings(tmp_path: Path, checkpoint: Path, data: Path) -> Path:
    trainer = trainer_config(tmp_path / "runs", data, "", mode="async", max_staleness=1, iterations=8)
    tables = {
        "broker": {"lease_idle_s": 1.0},
        "generator": {
            "port": 0,
            "threads": 1,
            "dataset": {"root": str(data)},
            "weights_dir": str(tmp_path / "weights"),
            "samples_dir": str(tmp_path / "samples"),
            "dit": {"checkpoint": str(checkpoint), "device": "cpu"},
        },
        "agent": {"images_per_sample": 2, "steps": 4, "unit_size": 4},
        "trainer": trainer.model_dump(mode="json", exclude_none=True) | {"checkpoint_every": 1},
    }
    tables["trainer"]["service"]["on_outage"] = "wait"
    path = tmp_path / "run.toml"
    path.write_text(tomli_w.dumps(tables))
    return path


def children(of: int, module: str) -> list[int]:
    """Process ids of the children that run a module, in the order of their start."""
    table = subprocess.run(["ps", "-eo", "pid=,args="], capture_output=True, text=True, check=True).stdout
    family, lines = descendants(of), (line.split(maxsplit=1) for line in table.splitlines())
    return sorted(int(pid) for pid, arguments in lines if module in arguments and int(pid) in family)


def wait_until(condition, timeout_s: float = 100.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.02)


def test_up_survives_the_death_of_a_replica_and_of_the_trainer(tmp_path: Path, settings: Path):
    metrics = tmp_path / "runs" / "run" / "metrics.jsonl"
    (tmp_path / "runs" / "run").mkdir(parents=True)
    (tmp_path / "runs" / "run" / "of an earlier run").touch()
    with onthefly(tmp_path / "log", "up", "--config", str(settings), "--replicas", "2", "--fresh") as process:
        wait_until(lambda: (metrics.exists() and len(record.rows(metrics)) >= 3) or process.poll() is not None)
        first, _ = children(process.pid, "-m generator_service")
        (trainer,) = children(process.pid, "-m trainer")
        os.kill(first, signal.SIGKILL)
        os.kill(trainer, signal.SIGKILL)
        seen = descendants(process.pid)
        wait_until(lambda: process.poll() is not None)
    log = (tmp_path / "log").read_text()
    assert process.returncode == 0, log
    assert alive(seen) == set()
    assert log.count("generator 1 died: signal SIGKILL") == log.count("trainer died: signal SIGKILL") == 1
    assert "going on at iteration" in log
    assert (tmp_path / "runs" / "run.1" / "of an earlier run").exists() and not (tmp_path / "runs" / "run.2").exists()
    run = record.Record.open(tmp_path / "runs" / "run")
    assert [row["iteration"] for row in run.metrics] == list(range(8))
    twice = [name for name, times in Counter(row["id"] for row in run.selection).items() if times > 1]
    assert run.selection and not twice
    assert (tmp_path / "samples").is_dir() and (tmp_path / "samples-2").is_dir()


def test_a_generator_that_fails_at_the_very_first_start_ends_it_at_once(tmp_path: Path, settings: Path):
    nowhere = ("--set", 'generator.dataset.root="/nowhere"')
    with onthefly(tmp_path / "log", "up", "--config", str(settings), *nowhere) as process:
        assert process.wait(60) == 1
    log = (tmp_path / "log").read_text()
    assert "/nowhere" in log and "the generator stopped while it was starting" in log
    assert "started again" not in log
