"""The README's section on clips is run, on drawn faces and small models of the real classes: a policy is learnt, then a
training asks for scarce expressions while it goes on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from generator_service.faces.landmark_model import Card, LandmarkModel, Network
from protocol import codec
from protocol.entries import Sample
from tests.expressions import world
from tests.generator_service import tiny_t2v
from tests.system.readme import SHORT, one, overrides, shell
from trainer.books import balance
from trainer.record import Record
from trainer.report.page import page

SIZE, FRAMES = 32, 4
COUNTS = {"disgust": 1, "fear": 1, "happiness": 9, "neutral": 8, "surprise": 2}
SCARCE = ("disgust", "fear", "surprise")
STEPS, PAIRS = [1, 2], [[2.0, 2.0], [3.0, 2.0]]
CIRCLE = [(0.5 + 0.3 * np.cos(at), 0.5 + 0.3 * np.sin(at)) for at in np.linspace(0, 6, 68)]
SMALL = [
    *(setting for setting in SHORT if not setting.startswith(("agent.adapt", "agent.steps", "generator.dit"))),
    "generator.ti2v={checkpoint = 'film', device = 'cpu', window = 3}",
    "generator.faces.landmarks.device=cpu",
    "generator.faces.min_presence=0.0",
    "generator.faces.min_side=32",
    "generator.faces.min_contrast=0.0",
    f"agent.expressions.frames={FRAMES}",
    "agent.expressions.clips_per_unit=2",
    f"agent.policy.actions={{steps = {STEPS}, pairs = {PAIRS}}}",
    "agent.policy.steps=2",
    "agent.policy.batch_size=2",
    "agent.policy.frames=2",
    "agent.policy.pairs=6",
    "agent.policy.validation_pairs=2",
    "trainer.warmup_iterations=2",
    "trainer.model={model = 'small_cnn', head = 'transformer', image_size = 32, frames = 4, hidden = 8, layers = 1}",
    f"trainer.feedback.scarcity.classes={list(SCARCE)}",
    "trainer.feedback.scarcity.clips=1",
    "trainer.measure={corruptions = [], features_per_class = 0}",
]


def landmark_model(folder: Path) -> None:
    """A checkpoint with random weights; that one finds faces well is measured elsewhere."""
    torch.manual_seed(0)
    grey = (0.5, 0.5, 0.5)
    card = Card(
        model="test_convnext", stage=1, size=SIZE, channels=4, mean=grey, std=grey, shape=CIRCLE, neutral=CIRCLE
    )
    network = Network(card)
    torch.nn.init.normal_(network.head.weight, std=0.02)
    LandmarkModel(card, network, "cpu", "").save(folder)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_clips(tmp_path: Path, environment: dict[str, str]):
    (tmp_path / "faces.toml").write_text(one("toml", "# faces.toml").replace('dtype = "float16"', ""))
    world.write_dataset(tmp_path / "faces", seed=0, size=SIZE, frames=FRAMES + 2, counts=COUNTS, subjects=5)
    few = dict.fromkeys(COUNTS, 2)
    world.write_dataset(tmp_path / "faces", seed=0, size=SIZE, frames=FRAMES, counts=few, split="test")
    tiny_t2v.save_checkpoint(tmp_path / "film", size=SIZE)
    landmark_model(tmp_path / "landmark-model")
    environment.pop("ONTHEFLY_BROKER_URL")
    script = one("sh", "onthefly faces").replace("faces.toml", f"faces.toml {overrides(SMALL)}")
    told = shell(script, tmp_path, environment)
    assert "learn a policy that chooses steps and guidance" in told  # the plan
    record = Record.open(tmp_path / "runs" / "faces")
    assert balance(record).problems == []
    samples = [sample for batch in record.batches for sample in batch.samples]
    wanted = {(number, f"class:{name}") for number in (1, 2) for name in SCARCE}
    assert {(sample.feedback, sample.source_id) for sample in samples} == wanted
    assert all(made_as_chosen(sample) for sample in samples)
    last = record.metrics[-1]
    assert last["synthetic_rows"] > 0 and 0 <= last["test_uar"] <= 1
    file = tmp_path / "runs" / "faces" / "batches" / "000001-000000.safetensors"
    first = next(batch for batch in record.batches if (batch.feedback, batch.unit) == (1, 0))
    assert codec.decode(file.read_bytes())["images"].shape == (len(first.samples), FRAMES, SIZE, SIZE, 3)
    assert "image/webp" in page(record)


def made_as_chosen(sample: Sample) -> bool:
    """Whether the policy chose how it was made, and its prompt was composed; of which models read no codes."""
    assert sample.guidance is not None and sample.init_frame is not None
    chosen = sample.steps in STEPS and [sample.guidance.a, sample.guidance.b] in PAIRS
    composed = sample.action_units and not any(unit in sample.prompt for unit in sample.action_units)
    return bool(sample.policy and chosen and composed and sample.weights.name == "faces-policy")
