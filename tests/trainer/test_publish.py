"""What a run writes of its model to publish it, and what publishing may not do to the run. That the service takes it is
in tests/system."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load
from torch import nn

from protocol.bus import QueueConfig
from protocol.dataset import DatasetConfig
from protocol.errors import ConfigError
from protocol.published import PublishedCard
from tests.trainer.run_folder import write_dataset
from trainer import publish
from trainer.loop import train
from trainer.record import rows
from trainer.run import Run
from trainer.settings import TrainerConfig
from trainer.start import open_run

MODEL = {"image_size": 32, "model": "test_resnet"}


@pytest.fixture
def data(tmp_path: Path) -> DatasetConfig:
    write_dataset(tmp_path / "data")
    return DatasetConfig(root=tmp_path / "data", split="train")


@pytest.fixture
def nobody() -> str:
    """A URL at which nothing answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def settings(tmp_path: Path, data: DatasetConfig, url: str, **more: object) -> TrainerConfig:
    plain = {"runs_dir": tmp_path, "dataset": data, "mode": "real", "device": "cpu", "threads": 1, "test_split": ""}
    plain |= {"model": MODEL, "epochs": 1, "batch_size": 5, "gradient_rows": 0, "iterations": 3}
    plain |= {"measure": {"features_per_class": 0}, "publish": {"name": "face"}}
    return TrainerConfig.model_validate(plain | {"service": {"url": url, "timeout_s": 5.0}} | more)


def trained(config: TrainerConfig) -> Run:
    with open_run(config, QueueConfig()) as (run, source):
        train(run, source)
    return run


def test_what_is_written_is_timms_model_without_its_classifier(tmp_path: Path, data: DatasetConfig, nobody: str):
    model = MODEL | {"model": "timm:test_vit", "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.25, 1.0)}
    run = trained(settings(tmp_path, data, nobody, model=model))
    written = publish.written(run)
    assert written == publish.written(run)
    (tmp_path / "file").write_bytes(written)
    with safe_open(tmp_path / "file", "pt") as file:
        card = PublishedCard.of(file.metadata())
    assert (card.model, card.run, card.iteration, card.updates) == ("test_vit", "run", 2, 6)
    assert card.size == (32, 32)
    assert card.mean == pytest.approx((0.1, 0.2, 0.3)) and card.std == pytest.approx((0.5, 0.25, 1.0))
    bare, state = timm.create_model(card.model, num_classes=0, **card.options), load(written)
    bare.load_state_dict(state)
    trained_state = run.model.state_dict()
    assert all(torch.equal(tensor, trained_state[name]) for name, tensor in state.items())
    assert {name.split(".")[0] for name in trained_state.keys() - state.keys()} == {"head"}


def test_a_run_goes_on_without_the_service_and_says_so_once(tmp_path: Path, data: DatasetConfig, nobody: str):
    run = trained(settings(tmp_path, data, nobody))
    assert run.at.iteration == 3
    (told,) = rows(run.config.folder / "events.jsonl")
    assert told["event"] == "unpublished" and "training goes on" in told["message"] and nobody in told["message"]
    tried = [row["iteration"] for row in rows(run.config.folder / "trace.jsonl") if row["what"] == "publish"]
    assert tried == [0, 1, 2]


def test_a_service_that_does_not_answer_holds_training_up_for_the_timeout_only(tmp_path: Path, data: DatasetConfig):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and says nothing
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        limits = {"name": "face", "timeout_s": 0.5}
        began = time.monotonic()
        run = trained(settings(tmp_path, data, url, publish=limits, iterations=1))
        spent = [
            row["end"] - row["start"] for row in rows(run.config.folder / "trace.jsonl") if row["what"] == "publish"
        ]
    assert len(spent) == 1 and 0.3 < spent[0] < 5.0 and time.monotonic() - began < 60.0


def test_publishing_changes_nothing_of_the_run(tmp_path: Path, data: DatasetConfig, nobody: str):
    model = MODEL | {"drop_rate": 0.5}
    with_it = trained(settings(tmp_path, data, nobody, run="with", model=model))
    without = trained(settings(tmp_path, data, nobody, run="without", model=model, publish={}))
    assert rows(without.config.folder / "events.jsonl") == []
    for one, other in zip(with_it.model.parameters(), without.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_every_nth_iteration(tmp_path: Path, data: DatasetConfig, nobody: str):
    run = trained(settings(tmp_path, data, nobody, iterations=5, publish={"name": "face", "every": 2}))
    tried = [row["iteration"] for row in rows(run.config.folder / "trace.jsonl") if row["what"] == "publish"]
    assert tried == [1, 3]


def test_a_model_that_is_not_timms_is_refused_at_the_start(tmp_path: Path, data: DatasetConfig, nobody: str):
    with pytest.raises(ConfigError, match=r"small_cnn.*timm.*resnet18") as refused:
        trained(settings(tmp_path, data, nobody, model={"image_size": 32}))
    assert refused.value.param == "model"
    assert rows(tmp_path / "run" / "metrics.jsonl") == []


def test_a_model_of_the_callers_own_is_refused_at_the_start(tmp_path: Path, data: DatasetConfig, nobody: str):
    own = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2))
    with (
        pytest.raises(ConfigError, match="is not timm's"),
        open_run(settings(tmp_path, data, nobody), QueueConfig(), model=own),
    ):
        raise AssertionError("it was opened")
    with (
        pytest.raises(ConfigError, match=r"transform of yours.*trainer\.publish"),
        open_run(
            settings(tmp_path, data, nobody),
            QueueConfig(),
            preprocess=lambda images: images.permute(0, 3, 1, 2).float(),
        ),
    ):
        raise AssertionError("it was opened")
