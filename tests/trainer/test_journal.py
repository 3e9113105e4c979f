from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from protocol.errors import DiskFull
from tests.trainer.test_durable import FULL, needs_full_device
from tests.trainer.test_pool import make_batch
from trainer.journal import Journal
from trainer.pool import Pool
from trainer.record import rows


def test_half_a_line_is_cut_and_the_next_one_stands_alone(tmp_path: Path):
    for name in ("events.jsonl", "trace.jsonl", "metrics.jsonl", "selection.jsonl"):
        (tmp_path / name).write_text('{"iteration": 0}\n{"iteration": 1, "up')
    (tmp_path / "half.jsonl").write_text('{"a"')
    journal = Journal(tmp_path)
    journal.metrics({"iteration": 1})
    assert (tmp_path / "half.jsonl").read_text() == ""
    assert rows(tmp_path / "metrics.jsonl") == [{"iteration": 0}, {"iteration": 1}]
    assert rows(tmp_path / "trace.jsonl") == [{"iteration": 0}]


def test_each_sample_has_its_fate(tmp_path: Path):
    pool, journal = Pool(tmp_path / "batches"), Journal(tmp_path)
    pool.admit(*make_batch(0, 0, 1, ["late"]))
    pool.admit(*make_batch(1, 0, 1, ["copy", "kept", "low"]))
    journal.dropped(2, pool.drop_stale(1), "stale")
    copy, kept, low = pool.take(1)
    journal.dropped(2, [copy], "near copy")
    journal.selection(2, [kept, low], [0.5, float("nan")], [True, False])
    told = [(row["source"], row["fate"], row["kept"], row["vog"]) for row in rows(tmp_path / "selection.jsonl")]
    assert told == [
        ("late", "stale", False, None),
        ("copy", "near copy", False, None),
        ("kept", "trained", True, 0.5),
        ("low", "vog", False, None),
    ]


@pytest.mark.parametrize(("selected", "left"), [(False, [0]), (True, [0, 1])])
def test_a_resumed_run_forgets_what_it_does_again(tmp_path: Path, selected: bool, left: list[int]):
    for name in ("metrics.jsonl", "selection.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps({"iteration": n}) + "\n" for n in (0, 1, 2)))
    Journal(tmp_path).rewind(1, selected=selected)
    assert [row["iteration"] for row in rows(tmp_path / "metrics.jsonl")] == [0]
    assert [row["iteration"] for row in rows(tmp_path / "selection.jsonl")] == left


@needs_full_device
def test_what_a_full_disk_does_not_take_is_written_once_there_is_room(tmp_path: Path):
    journal, path = Journal(tmp_path), tmp_path / "metrics.jsonl"
    path.symlink_to(FULL)
    journal.metrics({"iteration": 0})
    with pytest.raises(DiskFull, match=r"metrics\.jsonl"):
        journal.sync()
    with pytest.raises(DiskFull):
        journal.close()
    path.unlink()
    journal.metrics({"iteration": 1})
    assert [row["iteration"] for row in rows(path)] == [0, 1]
    journal.sync()
    journal.close()
    assert [row["iteration"] for row in rows(path)] == [0, 1]


def test_numbers_are_read_by_tensorboard(tmp_path: Path):
    journal = Journal(tmp_path)
    for iteration in range(3):
        journal.metrics({"iteration": iteration, "loss": 1.0 / (1 + iteration), "note": "x", "per_class": [1.0]})
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert read.Tags()["scalars"] == ["loss"]
    points = read.Scalars("loss")
    assert [point.step for point in points] == [0, 1, 2]
    assert [point.value for point in points] == pytest.approx([1.0, 0.5, 1 / 3])
