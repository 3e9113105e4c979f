"""`onthefly up`, whole: cold start, then a training during which the generator is tuned and its weights exchanged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tomli_w

from agent import machine
from generator_service.backends.interface import Row, Sampling
from generator_service.weights import WeightStore
from protocol import codec
from tests.generator_service.tiny_dit import open_backend
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
        "update": {"learning_rate": 0.02},  # so that each set draws other pictures
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
    redrawn(tmp_path, checkpoint, record)
    assert f"{len(made)} weight sets made the samples of this run. No batch mixes them" in page(record)


def redrawn(folder: Path, checkpoint: Path, record: Record) -> None:
    """Every batch, drawn anew with the weights that it names, is the same to the bit; with others it is not."""
    backend = open_backend(checkpoint)
    store = WeightStore(folder / "weights", checkpoint, backend.name, backend.classes)
    named = [batch for batch in record.batches if batch.samples]
    known = {batch.weights: store.pinned(batch.weights) for batch in named}
    for batch in named:
        first = batch.samples[0]
        rows = [Row(sample.seed, sample.label, sample.guidance_scale) for sample in batch.samples]
        sampling = Sampling(first.steps, first.scheduler, guided=first.guidance_scale > 1)
        file = folder / "run" / "batches" / f"{batch.feedback:06d}-{batch.unit:06d}.safetensors"
        stored = codec.decode(file.read_bytes())["images"]
        drawn = {ref: backend.generate(weights, rows, sampling) for ref, weights in known.items()}
        assert {ref for ref, images in drawn.items() if np.array_equal(images, stored)} == {batch.weights}
