"""Folders that a run goes on from, or refuses to. That a resumed run is the uninterrupted one is in tests/system."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from protocol.bus import QueueConfig
from protocol.dataset import Dataset, DatasetConfig
from protocol.errors import ConfigError
from tests.trainer.run_folder import RunFolder, write_dataset
from trainer import books, checkpoint, registry, resume
from trainer.board import Reporter
from trainer.data.splits import open_splits
from trainer.journal import Journal
from trainer.loop import train
from trainer.parallel import OneProcess
from trainer.pool import Pool
from trainer.record import Record, rows
from trainer.run import Run
from trainer.settings import TrainerConfig
from trainer.start import open_run


@pytest.fixture
def data(tmp_path: Path) -> DatasetConfig:
    write_dataset(tmp_path / "data")
    return DatasetConfig(root=tmp_path / "data", split="train")


def settings(tmp_path: Path, data: DatasetConfig, **more: object) -> TrainerConfig:
    plain = {"runs_dir": tmp_path, "dataset": data, "mode": "real", "device": "cpu", "threads": 1, "test_split": ""}
    plain |= {"model": {"image_size": 8}, "epochs": 1, "batch_size": 5, "gradient_rows": 0}
    return TrainerConfig.model_validate(plain | {"measure": {"features_per_class": 0}} | more)


def trained(config: TrainerConfig) -> Run:
    with open_run(config, QueueConfig()) as (run, source):
        train(run, source)
    return run


def test_a_folder_older_than_learnt_thresholds_is_gone_on_from(tmp_path: Path, data: DatasetConfig):
    """Neither its checkpoint nor its metrics know of them."""
    whole = trained(settings(tmp_path, data, run="whole", iterations=2))
    old = trained(settings(tmp_path, data, run="old", iterations=1))
    state = checkpoint.load(old.config.folder / "checkpoints")
    assert state is not None and state.pop("thresholds") == {}
    checkpoint.save(old.config.folder / "checkpoints", state, updates=old.at.updates)
    (row,) = rows(old.config.folder / "metrics.jsonl")
    del row["similarity_dropped"]
    (old.config.folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    resumed = trained(settings(tmp_path, data, run="old", iterations=2))
    assert (resumed.at.iteration, resumed.at.updates) == (2, whole.at.updates)
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_metrics_older_than_the_similarity_filter_are_read(tmp_path: Path, data: DatasetConfig):
    made = RunFolder(tmp_path / "run", Dataset.open(data), data, mode="sync")
    made.ask(2, [0, 1])
    made.answer(2, 0, (0, 1), [0, 1])
    made.finish(2, made.select(2, [0.4, 0.3, 0.2, 0.1], dropped=(3,)))
    (row,) = rows(made.folder / "metrics.jsonl")
    del row["similarity_dropped"]
    (made.folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (point,) = Reporter(a_run(made.config), None).status("training").curve
    assert (point.candidates, point.kept) == (4, 3)
    assert books.balance(Record.open(made.folder)).problems == []


# ---------------------------------------------------------------- what it is measured on


def test_pairs_that_were_moved_are_the_same_pairs(tmp_path: Path, data: DatasetConfig):
    """But others, or another model, are not."""
    pictures = sorted(path.name for path in (data.root / "train" / "cat").iterdir())[:4]
    rows = [f"{pictures[0]},{pictures[1]},1,0", f"{pictures[0]},{pictures[2]},0,0"]
    rows += [f"{pictures[1]},{pictures[2]},1,1", f"{pictures[1]},{pictures[3]},0,1"]
    for place in ("here", "there"):
        shutil.copytree(data.root / "train" / "cat", tmp_path / place)
        (tmp_path / place / "pairs.csv").write_text("\n".join(["first,second,same,fold", *rows]))

    def face(place: str, name: str = "mine", **model: object) -> TrainerConfig:
        pairs = {"name": name, "layout": "csv", "root": str(tmp_path / place), "links_to": [str(tmp_path)]}
        plain = {"model": "small_cnn", "image_size": [8, 8], "embedding": 4, "pairs": [pairs]}
        return settings(tmp_path, data, task="face", iterations=1, model=plain | model)

    first = trained(face("here"))
    with open_run(face("there"), QueueConfig()) as (resumed, _):
        assert resumed.at.iteration == 1
        assert torch.equal(resumed.model.head.weight, first.model.head.weight)
    for other in (face("there", name="other"), face("there", embedding=6), face("there", scale=8.0)):
        with pytest.raises(ConfigError, match="holds a run with another model"), open_run(other, QueueConfig()):
            raise AssertionError("it was opened")


def test_how_many_are_learnt_says_nothing_of_how_many_are_looked_at(tmp_path: Path, data: DatasetConfig):
    shutil.copytree(data.root / "train", data.root / "test")
    few = data.model_copy(update={"max_per_class": 2})
    with open_run(settings(tmp_path, few, test_split="test"), QueueConfig()) as (run, _):
        assert run.real.labels.bincount().tolist() == [2, 2]
        assert len(run.test) == len(Dataset.open(data)) > 4


# ---------------------------------------------------------------- learnt thresholds


def a_run(config: TrainerConfig) -> Run:
    """A run that asks nobody."""
    dataset = Dataset.open(config.dataset)
    kind = registry.resolve("task", config.task)
    task = kind(kind.Config(image_size=8), dataset.classes)
    splits = open_splits(config.model_copy(update={"test_split": ""}), dataset, task)
    return Run(config, task, splits, Pool(config.folder / "batches"), Journal(config.folder), OneProcess("cpu"))


OTHER_FILTERS = [
    {"vog": {"enabled": False}},  # the bandit of what is dropped then has one arm
    {"vog": {"enabled": False}, "similarity": {"enabled": True}},
    {"max_staleness": 2},  # the gain of a question shows an iteration later
]


@pytest.mark.parametrize("other", OTHER_FILTERS, ids=["no filter", "similarity", "staleness"])
def test_learnt_thresholds_are_for_one_filter_and_staleness(tmp_path: Path, data: DatasetConfig, other: dict):
    learnt = {"mode": "async", "thresholds": {"auto": True, "held_out": 0.2}}
    before = a_run(settings(tmp_path, data, **learnt))
    assert resume.restore(before) is False
    resume.save(before)
    assert resume.restore(a_run(settings(tmp_path, data, **learnt))) is True
    with pytest.raises(ConfigError, match="holds a run with another thresholds"):
        resume.restore(a_run(settings(tmp_path, data, **learnt, **other)))
    shutil.rmtree(before.config.folder)
    fixed = {"mode": "async"}  # where nothing is learnt, both may change
    resume.save(a_run(settings(tmp_path, data, **fixed)))
    assert resume.restore(a_run(settings(tmp_path, data, **fixed, **other))) is True
