"""Processes that train a run together, from real torchrun: more or fewer of them later, and what ends them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch

from protocol.errors import ConfigError
from tests.system.whole import run_training, serving, trainer_config
from trainer import checkpoint as checkpoints
from trainer import record
from trainer.run import Run
from trainer.settings import TrainerConfig

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
# No dropout, whose numbers each process draws for itself; and few, small steps: where float32 rounds differently, and a
# ReLU is at its kink, two trajectories part, also those of one process.
SETTINGS = {"model": {"image_size": 8, "shift": 1}, "epochs": 1, "optimizer": {"learning_rate": 0.01}}
TOLERANCE = 1e-4  # relative to the largest value; most of it is float32 adding in another order


class Interrupted(Exception):
    pass


def write_settings(path: Path, config: TrainerConfig) -> Path:
    path.write_text(tomli_w.dumps({"trainer": config.model_dump(mode="json", exclude_none=True)}))
    return path


def trained_on(folder: Path) -> list[tuple[int, str, bool]]:
    """What VoG did with every sample, in the order in which it came."""
    return [(row["iteration"], row["id"], row["kept"]) for row in record.rows(folder / "selection.jsonl")]


def assert_close(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, values in one.items():
        torch.testing.assert_close(
            values.double(), other[name].double(), rtol=0, atol=TOLERANCE * float(values.abs().max()) + 1e-12
        )


def weights(folder: Path) -> dict[str, Any]:
    state = checkpoints.load(folder / "checkpoints")
    assert state is not None
    return state["model"]


def metrics(config: TrainerConfig) -> list[dict[str, Any]]:
    return record.rows(config.folder / "metrics.jsonl")


def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path, broker: str, checkpoint: Path, data: Path):
    """One process until update 5, two until a signal, one to the end."""

    def stop(run: Run) -> None:
        if run.at.updates == 5:
            raise Interrupted

    with serving(tmp_path, broker, checkpoint, data) as url:
        longer = {**SETTINGS, "iterations": 8, "checkpoint_every": 4}
        whole, parts = (trainer_config(tmp_path / name, data, url, **longer) for name in ("whole", "parts"))
        run_training(whole, broker)
        with pytest.raises(Interrupted):
            run_training(parts, broker, stop)
        interrupted_after_an_iteration(write_settings(tmp_path / "run.toml", parts), parts, broker)
        assert 2 <= len(metrics(parts)) < 8
        run_training(parts, broker)
    assert trained_on(parts.folder) == trained_on(whole.folder)
    assert_close(weights(whole.folder), weights(parts.folder))
    assert [row["updates"] for row in metrics(parts)] == [row["updates"] for row in metrics(whole)]


def interrupted_after_an_iteration(settings: Path, config: TrainerConfig, broker: str) -> None:
    """`onthefly train --processes 2`, asked to stop after two iterations."""
    command = [sys.executable, "-m", "agent.cli", "train", "--processes", "2", "--config", str(settings)]
    environment = {**os.environ, "ONTHEFLY_BROKER_URL": broker}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60.0
        while len(metrics(config)) < 2 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=40)
    assert process.returncode not in (0, None)
    assert said.count("interrupted: start the same command again") == 1
    assert "crashed" not in said


def test_what_ends_one_process_ends_all_and_is_said_once(tmp_path: Path, data: Path):
    config = trainer_config(tmp_path, data, "", mode="real", optimizer={"learning_rate": 1e20})
    settings = write_settings(tmp_path / "run.toml", config)
    result = subprocess.run(
        [*TORCHRUN, "trainer", "--config", str(settings)], capture_output=True, text=True, timeout=100
    )
    assert result.returncode == 1
    assert result.stderr.count("error: the loss is NaN or infinite") == 1
    assert result.stderr.count("Traceback") == 1  # torchrun's own


def test_the_drop_in_is_for_one_process(tmp_path: Path, broker: str, data: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="without torchrun"):
        run_training(trainer_config(tmp_path, data, "", mode="real"), broker)
