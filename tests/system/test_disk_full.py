"""The disk of a run's folder fills up while it trains."""

from __future__ import annotations

from pathlib import Path

import pytest

from protocol.errors import DiskFull
from tests.system.whole import run_training, trainer_config
from tests.trainer.test_durable import FULL, needs_full_device
from trainer import checkpoint, record
from trainer.run import Run
from trainer.settings import TrainerConfig

pytestmark = needs_full_device


def fill(config: TrainerConfig, first: int, last: int):
    """From iteration `first` to `last`, there is no room for any checkpoint's manifest."""

    def after_update(run: Run) -> None:
        partial = config.folder / "checkpoints" / f"{checkpoint.MANIFEST}.partial"
        if first <= run.at.iteration <= last and not partial.is_symlink():
            partial.symlink_to(FULL)

    return after_update


def told(config: TrainerConfig) -> list[str]:
    return [row["event"] for row in record.rows(config.folder / "events.jsonl")]


def test_training_goes_on_and_its_end_insists(tmp_path: Path, data: Path):
    whole = run_training(trainer_config(tmp_path / "whole", data, "", mode="real"), "embedded")
    config = trainer_config(tmp_path / "full", data, "", mode="real")
    with pytest.raises(DiskFull, match="start the same command again"):
        run_training(config, "embedded", fill(config, 2, 4))
    assert told(config) == ["disk_full"]  # said once
    state = checkpoint.load(config.folder / "checkpoints")
    assert state is not None
    assert state["position"]["iteration"] == 2
    again = run_training(config, "embedded")
    assert again.at.iteration == 5
    assert [row["iteration"] for row in record.rows(config.folder / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    assert all((again.model.state_dict()[name] == value).all() for name, value in whole.model.state_dict().items())


def test_once_there_is_room_it_is_as_before(tmp_path: Path, data: Path):
    config = trainer_config(tmp_path, data, "", mode="real")
    assert run_training(config, "embedded", fill(config, 1, 1)).at.iteration == 5
    assert told(config) == ["disk_full"]
    state = checkpoint.load(config.folder / "checkpoints")
    assert state is not None
    assert state["position"]["iteration"] == 5
