"""`onthefly up`, whole: cold start, then a training during which the generator is tuned and its weights exchanged."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomli_w

from agent import machine
from tests.system.whole import trainer_config
from trainer.books import balance
from trainer.record import Record
from trainer.report import versions
from trainer.report.page import page


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_weights_are_exchanged_during_a_training_and_no_batch_mixes_them(tmp_path: Path, checkpoint: Path, data: Path):
    measure = {"corruptions": [], "features_per_class": 0}
    small = {"mode": "async", "iterations": 10, "warmup_iterations": 1, "epochs": 2, "measure": measure}
    trainer = trainer_config(tmp_path, data, "", vog={"enabled": False}, feedback={"fraction": 0.5}, **small)
    tune = {
        "name": "tuned",
        "steps": 100_000,
        "publish_every": 1,
        "activate": True,
        "features": "timm:test_resnet",
        "features_size": 32,
        "pretrained": False,
        "rollout": {"identities": 2, "samples": 2, "denoising_steps": 3, "batch_size": 4},
        "guard": {"kl_ceiling": 1e6, "diversity_floor": 0.0},
    }
    adapt = {"name": "mine", "steps": 1, "batch_size": 4, "activate": True}
    tables = {
        "generator": {
            "threads": 1,
            "port": 0,
            "weights_dir": str(tmp_path / "weights"),
            "samples_dir": str(tmp_path / "samples"),
            "dit": {"checkpoint": str(checkpoint), "device": "cpu"},
        },
        "agent": {"steps": 4, "init": False, "adapt": adapt, "tune": tune, "tune_while_training": True},
        "trainer": trainer.model_dump(mode="json", exclude_none=True),
    }
    path = tmp_path / "live.toml"
    path.write_text(tomli_w.dumps(tables))
    assert machine.up(path, [], fresh=False) == 0
    record = Record.open(tmp_path / "run")
    made = versions.versions(record)
    tuned = [version for version in made if version.weights.name == "tuned"]
    assert len(tuned) >= 2 and all(version.weights.name in ("mine", "tuned") for version in made)
    assert sum(version.trained.total() for version in tuned) > 0
    assert versions.mixed(record) == []
    assert balance(record).problems == []
    assert f"{len(made)} weight sets made the samples of this run. No batch mixes them" in page(record)
