"""`onthefly up`, whole, on clips: a policy is learnt, then a training asks for scarce expressions while it goes on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tomli_w
import torch

from agent import machine
from generator_service.faces.landmark_model import Card, LandmarkModel, Network
from protocol import codec
from tests.expressions import world
from tests.generator_service import tiny_t2v
from trainer.books import balance
from trainer.record import Record
from trainer.report.page import page

SIZE, FRAMES = 32, 4
COUNTS = {"happiness": 6, "neutral": 6, "surprise": 2}
CIRCLE = [(0.5 + 0.3 * np.cos(at), 0.5 + 0.3 * np.sin(at)) for at in np.linspace(0, 6, 68)]
ACTIONS = {"steps": [1, 2], "pairs": [[2.0, 2.0], [3.0, 2.0]]}


def landmark_model(folder: Path) -> Path:
    """A checkpoint with random weights; that it finds faces well is measured elsewhere."""
    torch.manual_seed(0)
    grey = (0.5, 0.5, 0.5)
    card = Card(
        model="test_convnext", stage=1, size=SIZE, channels=4, mean=grey, std=grey, shape=CIRCLE, neutral=CIRCLE
    )
    network = Network(card)
    torch.nn.init.normal_(network.head.weight, std=0.02)
    LandmarkModel(card, network, "cpu", "").save(folder)
    return folder


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    world.write_dataset(data, seed=0, size=SIZE, frames=FRAMES + 2, counts=COUNTS, subjects=5)
    world.write_dataset(data, seed=0, size=SIZE, frames=FRAMES, counts=dict.fromkeys(COUNTS, 2), split="test")
    tables = {
        "generator": {
            "port": 0,
            "threads": 1,
            "backend": "ti2v",
            "weights_dir": str(tmp_path / "weights"),
            "samples_dir": str(tmp_path / "samples"),
            "ti2v": {
                "checkpoint": str(tiny_t2v.save_checkpoint(tmp_path / "film", size=SIZE)),
                "device": "cpu",
                "window": 3,
            },
            "faces": {
                "reader": "landmarks",
                "folder": str(tmp_path / "faces"),
                "min_presence": 0.0,
                "min_side": SIZE,
                "min_contrast": 0.0,
                "landmarks": {"checkpoint": str(landmark_model(tmp_path / "landmarks")), "device": "cpu"},
            },
        },
        "agent": {
            "expressions": {"frames": FRAMES, "clips_per_unit": 2},
            "policy": {
                "name": "chooser",
                "steps": 2,
                "batch_size": 2,
                "candidates": 2,
                "top": 1,
                "frames": 2,
                "actions": ACTIONS,
                "validation_pairs": 2,
                "activate": True,
            },
        },
        "trainer": {
            "runs_dir": str(tmp_path),
            "device": "cpu",
            "threads": 1,
            "task": "video",
            "mode": "async",
            "iterations": 4,
            "warmup_iterations": 2,
            "epochs": 1,
            "batch_size": 8,
            "gradient_rows": 2,
            "dataset": {"root": str(data), "layout": "clips", "split": "train"},
            "model": {"model": "small_cnn", "image_size": SIZE, "frames": FRAMES, "hidden": 8, "layers": 1},
            "optimizer": {"learning_rate": 0.01},
            "feedback": {
                "fraction": 0.1,
                "images_per_sample": 1,
                "scarcity": {"enabled": True, "recall": 1.0, "classes": ["surprise"], "clips": 3},
            },
            "measure": {"corruptions": [], "features_per_class": 0},
        },
    }
    path = tmp_path / "expressions.toml"
    path.write_text(tomli_w.dumps(tables))
    return path


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_scarce_expressions_are_asked_for_made_and_learnt_from(settings: Path, tmp_path: Path):
    assert machine.up(settings, [], fresh=False) == 0
    record = Record.open(tmp_path / "run")
    assert balance(record).problems == []
    samples = [sample for batch in record.batches for sample in batch.samples]
    scarce = [sample for sample in samples if sample.source_id == "class:surprise"]
    assert len(scarce) == 2 * 3 and {sample.class_name for sample in scarce} == {"surprise"}
    assert all(sample.init_frame is not None and sample.action_units and not codes(sample) for sample in samples)
    assert all(
        sample.policy and sample.steps in ACTIONS["steps"] and sample.weights.name == "chooser" for sample in samples
    )
    assert all([sample.guidance.a, sample.guidance.b] in ACTIONS["pairs"] for sample in samples)
    batch = record.batches[0]
    stored = codec.decode(
        (tmp_path / "run" / "batches" / f"{batch.feedback:06d}-{batch.unit:06d}.safetensors").read_bytes()
    )
    assert stored["images"].shape == (len(batch.samples), FRAMES, SIZE, SIZE, 3)
    assert record.metrics[-1]["synthetic_rows"] > 0 and 0 <= record.metrics[-1]["test_uar"] <= 1
    assert "image/webp" in page(record)


def codes(sample) -> list[str]:
    """Codes of action units left in a prompt, which the model cannot read."""
    return [unit for unit in sample.action_units if unit in sample.prompt]
