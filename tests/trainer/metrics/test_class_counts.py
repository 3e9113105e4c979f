from __future__ import annotations

import math
from pathlib import Path

import pytest

from protocol.dataset import Dataset, DatasetConfig
from tests.trainer.run_folder import RunFolder, write_dataset
from trainer.metrics import class_counts
from trainer.metrics.class_counts import Relation
from trainer.record import Record

WARM = [0.9, 0.5, 0.7]  # accuracy of each class at the end of the warm-up
END = [0.9, 0.9, 0.8]


@pytest.fixture
def data(tmp_path: Path) -> DatasetConfig:
    write_dataset(tmp_path / "data", ("cat", "dog", "elk"))
    return DatasetConfig(root=tmp_path / "data", split="train")


def write(tmp_path: Path, data: DatasetConfig, **fields: object) -> Record:
    """Two iterations of warm-up, and two that are given 2 cats, 6 dogs and 4 elks, then 2 cats and 4 dogs."""
    run = RunFolder(tmp_path / "run", Dataset.open(data), data, mode="sync")
    for iteration, values in ((0, [0.1, 0.2, 0.3]), (1, WARM)):
        run.finish(iteration, **{"train_per_class": values, "per_class": values} | fields)
    run.answer(2, 0, (0, 1), [0, 5, 6, 7, 10, 11])
    run.finish(2, run.select(2, [], dropped=(2, 3)), **{"train_per_class": [0.9, 0.6, 0.7]} | fields)
    run.answer(3, 0, (2, 3), [0, 5, 6])
    run.finish(3, run.select(3, [], dropped=(0,)), **{"train_per_class": END, "per_class": END} | fields)
    return Record.open(run.folder)


def test_near_copies_dropped_from_a_pool_do_not_begin_stage_2(tmp_path: Path, data: DatasetConfig):
    """A synthetic run counts them on iteration 0."""
    record = write(tmp_path, data)
    record.metrics[0]["candidates"] = 2
    found = class_counts.first(record)
    assert found == Relation("training", [0, 1, 2], [2, 6, 4], WARM)
    gained = class_counts.gained(record)
    assert gained is not None and gained.values == pytest.approx([0.0, 0.4, 0.1])


def pearson(x: list[float], y: list[float]) -> float:
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    both = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return both / math.sqrt(sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y))


def test_the_first_iteration_stands_beside_the_accuracy_before_it(tmp_path: Path, data: DatasetConfig):
    found = class_counts.first(write(tmp_path, data))
    assert found == Relation("training", [0, 1, 2], [2, 6, 4], WARM)
    assert found.correlation == pytest.approx(-1.0)  # 2, 6, 4 are 11 - 10 x accuracy


def test_all_samples_stand_beside_the_gain(tmp_path: Path, data: DatasetConfig):
    found = class_counts.gained(write(tmp_path, data))
    assert found is not None
    assert (found.samples, found.values) == ([4, 10, 4], pytest.approx([0.0, 0.4, 0.1]))
    assert found.correlation == pytest.approx(pearson([4, 10, 4], [0.0, 0.4, 0.1]))


def test_late_samples_stand_beside_the_accuracy_when_they_were_asked_for(tmp_path: Path, data: DatasetConfig):
    record = write(tmp_path, data)
    late = record.config.model_copy(update={"mode": "async", "max_staleness": 1})
    found = class_counts.first(Record(**vars(record) | {"config": late}))
    assert found is not None and found.values == [0.1, 0.2, 0.3]


def test_held_out_accuracy_stands_in_where_the_training_set_is_learnt(tmp_path: Path, data: DatasetConfig):
    found = class_counts.first(write(tmp_path, data, train_per_class=[1.0, 1.0, 1.0]))
    assert found is not None and (found.split, found.values) == ("held-out", WARM)


def test_alike_classes_have_no_correlation(tmp_path: Path, data: DatasetConfig):
    found = class_counts.first(write(tmp_path, data, train_per_class=[1.0, 1.0, 1.0], per_class=[0.5, 0.5, 0.5]))
    assert found is not None and found.correlation is None


def test_classes_without_test_samples_are_left_out(tmp_path: Path, data: DatasetConfig):
    found = class_counts.first(write(tmp_path, data, train_per_class="absent", per_class=[0.9, None, 0.7]))
    assert found is not None and (found.labels, found.samples) == ([0, 2], [2, 4])


def test_a_run_without_samples_or_class_accuracies_has_none(tmp_path: Path, data: DatasetConfig):
    real = RunFolder(tmp_path / "real", Dataset.open(data), data, mode="real")
    real.finish(0)
    assert class_counts.first(Record.open(real.folder)) is class_counts.gained(Record.open(real.folder)) is None
    bare = write(tmp_path, data, train_per_class="absent", per_class="absent")
    assert class_counts.first(bare) is class_counts.gained(bare) is None
