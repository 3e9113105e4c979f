from __future__ import annotations

from pathlib import Path

import pytest

from protocol.dataset import Dataset, DatasetConfig
from tests.trainer.run_folder import RunFolder, write_dataset, write_run
from trainer.metrics.device_hours import device_hours, write_adaptation
from trainer.record import Record


@pytest.fixture
def data(tmp_path: Path) -> DatasetConfig:
    write_dataset(tmp_path / "data")
    return DatasetConfig(root=tmp_path / "data", split="train")


def seconds(run: RunFolder) -> dict[str, float]:
    return {stage: 3600 * hours for stage, hours in device_hours(Record.open(run.folder)).items()}


def test_stages_by_hand(tmp_path: Path, data: DatasetConfig):
    run = write_run(tmp_path / "run", Dataset.open(data), data)
    # One worker generated from 12 to 18, from 21.5 to 30 (three units that overlap) and from 32 to 34.
    wanted = {"generate": 16.5, "score": 4, "wait": 2, "vog": 2, "train": 24, "evaluate": 4}
    assert seconds(run) == pytest.approx(wanted)
    write_adaptation(run.folder, {"a@1": 30.0, "b@2": 12.0})
    assert next(iter(seconds(run).items())) == ("adapt", pytest.approx(42.0))


def test_every_device_of_the_trainer_counts(tmp_path: Path, data: DatasetConfig):
    run = RunFolder(tmp_path / "run", Dataset.open(data), data, mode="real")
    run.trainer("train", 0, 6, 0)
    run.finish(0, devices=4)
    assert seconds(run) == pytest.approx({"train": 24.0})


def test_workers_count_apart_and_captions_beside_them(tmp_path: Path, data: DatasetConfig):
    run = RunFolder(tmp_path / "run", Dataset.open(data), data)
    run.answer(1, 0, (0, 10), [0])
    run.answer(1, 1, (5, 12), [1])
    for unit, changes in enumerate(({"worker": "one", "captions_s": 2.5}, {"worker": "two"})):
        path = run.folder / "batches" / f"000001-{unit:06d}.json"
        batch = Record.open(run.folder).batches[unit].model_copy(update=changes)
        path.write_text(batch.model_dump_json())
    assert seconds(run) == pytest.approx({"caption": 2.5, "generate": 17.0})


def test_a_run_that_has_only_begun_took_nothing(tmp_path: Path, data: DatasetConfig):
    assert seconds(RunFolder(tmp_path / "run", Dataset.open(data), data)) == {}
