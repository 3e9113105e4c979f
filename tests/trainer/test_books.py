from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from protocol.bus import Bus, BusConfig
from protocol.dataset import Dataset, DatasetConfig
from protocol.entries import WorkRow, WorkUnit
from protocol.errors import ConfigError, GenerationFailed
from protocol.messages import Feedback, FeedbackAccepted
from tests.trainer.run_folder import WEIGHTS, RunFolder, write_dataset, write_run
from trainer import checkpoint
from trainer.books import Saved, balance, main, open_books, table
from trainer.record import Record, rows
from trainer.run import Position


@pytest.fixture
def data(tmp_path: Path) -> DatasetConfig:
    write_dataset(tmp_path / "data")
    return DatasetConfig(root=tmp_path / "data", split="train")


@pytest.fixture
def run(tmp_path: Path, data: DatasetConfig) -> RunFolder:
    """The run of `run_folder`, with the checkpoint at its end."""
    made = write_run(tmp_path / "run", Dataset.open(data), data)
    save(made, Position(iteration=4, updates=160))
    return made


def save(run: RunFolder, at: Position) -> None:
    state = {"position": asdict(at), "pool": run.pool.state_dict()}
    checkpoint.save(run.folder / "checkpoints", state, updates=at.updates)


def rewrite(path: Path, change: Callable[[list[dict]], list[dict]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in change(rows(path))))


# ---------------------------------------------------------------- a run by hand


def test_every_sample_has_one_fate(run: RunFolder):
    books = open_books(run.folder)
    assert books.problems == []
    came = {fate: n for fate, n in books.fates.items() if n}
    assert came == {"trained": 8, "vog": 3, "near copy": 1, "stale": 2, "unused": 2, "dead": 4}
    assert books.outstanding == {}
    assert (books.requested, books.finished, books.balanced) == (20, True, True)


def trained_twice(run: RunFolder) -> None:
    rewrite(run.folder / "selection.jsonl", lambda found: [*found, found[-1] | {"iteration": 3}])


def trained_in_two_iterations(run: RunFolder) -> None:
    rewrite(run.folder / "selection.jsonl", lambda found: [*found, found[1] | {"iteration": 3}])


def too_old(run: RunFolder) -> None:
    path = run.folder / "batches" / "000001-000000.json"
    path.write_text(path.read_text().replace('"feedback":1,"model', '"feedback":0,"model'))


def lost_batch(run: RunFolder) -> None:
    (run.folder / "batches" / "000002-000000.json").unlink()


def unasked_batch(run: RunFolder) -> None:
    (run.folder / "feedback" / "000002.json").unlink()


def answered_twice(run: RunFolder) -> None:
    batch = json.loads((run.folder / "batches" / "000002-000000.json").read_text())
    (run.folder / "batches" / "000002-000007.json").write_text(json.dumps(batch | {"unit": 7}))


def pixels_gone(run: RunFolder) -> None:
    (run.folder / "batches" / "000001-000000.safetensors").unlink()


def pixels_short(run: RunFolder) -> None:
    other = run.folder / "batches" / "000002-000002.safetensors"  # 2 rows for 8
    (run.folder / "batches" / "000001-000000.safetensors").write_bytes(other.read_bytes())


def checkpoint_knows_more(run: RunFolder) -> None:
    run.pool._used.add("f" * 32)
    save(run, Position(iteration=4, updates=160))


def checkpoint_forgot_stale(run: RunFolder) -> None:
    run.pool._stale.clear()
    save(run, Position(iteration=4, updates=160))


def checkpoint_elsewhere(run: RunFolder) -> None:
    save(run, Position(iteration=4, updates=161))


def iteration_lost(run: RunFolder) -> None:
    rewrite(run.folder / "metrics.jsonl", lambda found: found[:2] + found[3:])


def miscounted(run: RunFolder) -> None:
    rewrite(run.folder / "metrics.jsonl", lambda found: [*found[:-1], found[-1] | {"vog_dropped": 2}])


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (trained_twice, "decided on more than once: in iterations 3, 3"),
        (trained_in_two_iterations, "decided on more than once: in iterations 2, 3"),
        (too_old, "of feedback 0 was trained in iteration 2"),
        (lost_batch, "decided on, but never arrived"),
        (unasked_batch, "not what this run asked for: run.2.0.x, run.2.1.x, run.2.2.x"),
        (answered_twice, "answered twice"),
        (answered_twice, "feedback 2: 10 samples were promised and 14 came"),
        (pixels_gone, "000001-000000.safetensors is missing, and was trained on"),
        (pixels_short, "has no row 6, which was trained on"),
        (checkpoint_knows_more, "handed out by the checkpoint or by selection.jsonl, not by both: ffff"),
        (checkpoint_forgot_stale, "stale by the checkpoint or by selection.jsonl, not by both"),
        (checkpoint_elsewhere, "the checkpoint is at update 161, metrics.jsonl at 160"),
        (iteration_lost, "does not have each one before it once"),
        (miscounted, "iteration 3: metrics.jsonl counts"),
    ],
)
def test_what_contradicts_is_named(run: RunFolder, damage: Callable[[RunFolder], None], told: str):
    damage(run)
    books = open_books(run.folder)
    assert not books.balanced
    assert any(told in problem for problem in books.problems), books.problems


def test_a_sample_trained_too_early_or_too_late_is_named(tmp_path: Path, data: DatasetConfig):
    made = write_run(tmp_path / "run", Dataset.open(data), data)
    rewrite(made.folder / "selection.jsonl", lambda found: [found[0] | {"iteration": 0}])
    record = Record.open(made.folder)
    assert any("of feedback 1 was near copy in iteration 0" in problem for problem in balance(record).problems)


# ---------------------------------------------------------------- a run that is not finished


def test_what_a_resumed_run_decides_again_is_not_counted(tmp_path: Path, data: DatasetConfig):
    """Killed after iteration 2 was chosen and measured, before its checkpoint."""
    made = RunFolder(tmp_path / "run", Dataset.open(data), data)
    for iteration in (0, 1):
        made.finish(iteration)
    made.ask(1, range(2))
    made.answer(1, 0, (1, 2), range(2))
    save(made, Position(iteration=2, updates=80))
    made.finish(2, made.select(2, [0.1, 0.2, 0.3, 0.4], dropped=(0,)))
    books = open_books(made.folder)
    assert books.problems == []
    assert (books.fates["unused"], books.fates["trained"], books.finished) == (4, 0, False)
    save(made, Position(iteration=3, updates=120))
    assert open_books(made.folder).fates["trained"] == 3


def test_a_checkpoint_within_an_iteration_stands_for_its_choices(tmp_path: Path, data: DatasetConfig):
    made = RunFolder(tmp_path / "run", Dataset.open(data), data)
    for iteration in (0, 1):
        made.finish(iteration)
    made.ask(1, range(2))
    made.answer(1, 0, (1, 2), range(2))
    made.select(2, [0.1, 0.2, 0.3, 0.4], dropped=(0,))
    kept = [row["id"] for row in rows(made.folder / "selection.jsonl") if row["kept"]]
    save(made, Position(iteration=2, done=1, updates=81, kept=kept))
    assert open_books(made.folder).fates["trained"] == 3
    save(made, Position(iteration=2, done=1, updates=81, kept=kept[1:]))
    assert "trained in iteration 2 by the checkpoint or by selection.jsonl only" in open_books(made.folder).problems[0]


def test_a_run_without_a_checkpoint_is_at_its_beginning(tmp_path: Path, data: DatasetConfig):
    made = RunFolder(tmp_path / "run", Dataset.open(data), data)
    made.finish(0)
    books = open_books(made.folder)
    assert (books.balanced, books.finished, books.requested) == (True, False, 0)
    assert Saved.of(None) == Saved()


def test_outstanding_is_for_a_run_at_work_and_not_for_a_finished_one(tmp_path: Path, data: DatasetConfig):
    made = RunFolder(tmp_path / "run", Dataset.open(data), data)
    made.ask(1, range(5))
    made.answer(1, 0, (1, 2), range(2))
    books = open_books(made.folder)
    assert (books.requested, books.outstanding, books.balanced) == (10, {"feedback 1: not come": 6}, True)
    for iteration in range(4):
        made.finish(iteration)
    save(made, Position(iteration=4, updates=160))
    books = open_books(made.folder)
    assert (books.problems, books.balanced) == ([], False)
    assert "NOT balanced" in table(books)


def test_an_offline_pool_is_drawn_at_will(tmp_path: Path, data: DatasetConfig):
    made = RunFolder(tmp_path / "run", Dataset.open(data), data, mode="offline")
    made.ask(0, range(3))
    made.answer(0, 0, (0, 5), range(2))
    made.answer(0, 1, (0, 5), [2], failed=True)
    for iteration in (2, 3):
        made.finish(iteration, made.select(iteration, [0.1, 0.2, 0.3, 0.4], dropped=(0,)))
    books = balance(Record.open(made.folder))
    assert (books.problems, books.requested, books.fates["unused"], books.fates["dead"]) == ([], 6, 4, 2)


# ---------------------------------------------------------------- with the broker


def unit_of(asked: Feedback, number: int, sources: list[str]) -> WorkUnit:
    given = {"index": 0, "seed": 0, "label": 0, "class_name": "cat", "prompt": "", "guidance_scale": 1.0}
    return WorkUnit(
        id=f"{asked.run}.{asked.feedback}.{number}.{asked.fingerprint()}",
        run=asked.run,
        feedback=asked.feedback,
        unit=number,
        units=3,
        model_version=0,
        weights=WEIGHTS,
        steps=1,
        scheduler="ddim",
        strength=1.0,
        rows=[WorkRow(sample_id=f"{asked.run}-{number}-{name}", source_id=name, **given) for name in sources],
    )


@pytest.fixture
def queued(tmp_path: Path, data: DatasetConfig, broker_url: str) -> tuple[RunFolder, Bus, str]:
    """A feedback of 6 samples in three units, none of them made."""
    made = RunFolder(tmp_path / "run", Dataset.open(data), data)
    made.ask(1, range(3))
    asked = Record.open(made.folder).feedback[0]
    units = [unit_of(asked, number, ["a", "b"]) for number in range(3)]
    promise = FeedbackAccepted(run="run", feedback=1, units=3, samples=6, weights=WEIGHTS)
    bus = Bus(broker_url, BusConfig())
    bus.publish_plan("run", 1, "x", units, {}, promise)
    yield made, bus, broker_url
    bus.close()


def test_the_broker_knows_where_outstanding_samples_are(queued: tuple[RunFolder, Bus, str]):
    made, bus, url = queued
    assert open_books(made.folder, url).outstanding == {"feedback 1: in work": 6}
    claimed = bus.claim_work("w", 0.1)
    assert claimed is not None
    bus.fail_work(claimed, GenerationFailed("no").to_problem())
    books = open_books(made.folder, url)
    assert (books.problems, books.outstanding) == ([], {"feedback 1: in work": 4, "feedback 1: published": 2})
    delivery = bus.next_batch("run", "trainer")
    assert delivery is not None
    made.pool.admit(delivery.message, None)
    bus.ack_batch(delivery)
    books = open_books(made.folder, url)
    assert (books.problems, books.fates["dead"], books.outstanding) == ([], 2, {"feedback 1: in work": 4})


def test_a_broker_that_lost_everything_is_told(queued: tuple[RunFolder, Bus, str]):
    made, bus, url = queued
    bus.forget_run("run")
    assert open_books(made.folder, url).outstanding == {"feedback 1: not on the broker": 6}


def test_a_dead_letter_that_nobody_was_told_of_is_a_problem(queued: tuple[RunFolder, Bus, str]):
    made, bus, url = queued
    claimed = bus.claim_work("w", 0.1)
    assert claimed is not None
    bus.fail_work(claimed, GenerationFailed("no").to_problem())
    delivery = bus.next_batch("run", "trainer")
    assert delivery is not None
    bus.ack_batch(delivery)  # acknowledged and not admitted
    assert "dead letters of units that nobody was told of: run.1.0." in open_books(made.folder, url).problems[0]


# ---------------------------------------------------------------- the command


def test_the_command_prints_a_table_and_tells_by_its_status(run: RunFolder, capsys: pytest.CaptureFixture[str]):
    assert main([str(run.folder)]) == 0
    told = capsys.readouterr().out
    assert told.splitlines()[0] == "run run, finished"
    assert ["requested", "20"] in [line.split() for line in told.splitlines()]
    trained_twice(run)
    assert main([str(run.folder)]) == 1
    assert "problem: sample" in capsys.readouterr().out


def test_a_folder_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(ConfigError, match="holds no run"):
        open_books(tmp_path)
    assert main([str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
