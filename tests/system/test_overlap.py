"""Who works when, read off the trace: the order in which intervals start and end, not how long they take."""

from __future__ import annotations

from pathlib import Path

from tests.system.whole import run_training, serving, trainer_config
from trainer import record
from trainer.summary import overlaps

SLOW = {"fraction": 1.0, "images_per_sample": 8}  # of feedback: far more work than an iteration of training


def trace_of(tmp_path: Path, broker: str, checkpoint: Path, data: Path, **settings) -> list[dict]:
    with serving(tmp_path, broker, checkpoint, data) as url:
        run = run_training(trainer_config(tmp_path / "runs", data, url, feedback=SLOW, **settings), broker)
    trace = record.rows(run.config.folder / "trace.jsonl")
    generated = {row["feedback"] for row in trace if row["who"] == "generator"}
    assert generated, "the generator did work"
    return trace


def test_sync_never_generates_while_training(tmp_path: Path, broker: str, checkpoint: Path, data: Path):
    trace = trace_of(tmp_path, broker, checkpoint, data, mode="sync")
    assert overlaps(trace) == []
    for row in trace:
        if row["who"] == "generator":
            waits = [w for w in trace if w["what"] == "wait" and w["iteration"] == row["feedback"]]
            assert waits[0]["end"] >= row["end"]  # the iteration that asked also waited for it


def test_async_generates_while_training(tmp_path: Path, broker: str, checkpoint: Path, data: Path):
    trace = trace_of(tmp_path, broker, checkpoint, data, mode="async", max_staleness=1, epochs=6)
    pairs = overlaps(trace)
    assert pairs
    for generate, train in pairs:
        assert generate["start"] < train["end"]
        assert train["start"] < generate["end"]
        assert 0 <= train["iteration"] - generate["feedback"] <= 1


def test_async_feedback_starts_k_iterations_early_and_is_never_older_than_k(
    tmp_path: Path, broker: str, checkpoint: Path, data: Path
):
    with serving(tmp_path, broker, checkpoint, data) as url:
        config = trainer_config(tmp_path / "runs", data, url, mode="async", max_staleness=2, iterations=6)
        run = run_training(config, broker)
    folder = run.config.folder
    asked = sorted(int(path.stem) for path in (folder / "feedback").glob("*.json"))
    assert asked == [0, 1, 2, 3]  # stage 2 is iterations 2 to 5; answers to 4 and 5 would come too late
    feedback_of = {
        batch.samples[i].id: batch.feedback for batch in run.pool.batches() for i in range(len(batch.samples))
    }
    used = [(row["iteration"], feedback_of[row["id"]]) for row in record.rows(folder / "selection.jsonl")]
    assert used
    assert all(0 <= iteration - feedback <= 2 for iteration, feedback in used)
    ids = [row["id"] for row in record.rows(folder / "selection.jsonl")]
    assert len(ids) == len(set(ids))


def test_offline_pool_is_made_once_and_drawn_from_by_the_marginals(
    tmp_path: Path, broker: str, checkpoint: Path, data: Path
):
    with serving(tmp_path, broker, checkpoint, data) as url:
        run = run_training(trainer_config(tmp_path / "runs", data, url, mode="offline"), broker)
    # the pool needs no service any more
    again = trainer_config(tmp_path / "again", data, url, mode="offline")
    (again.runs_dir / "run").mkdir(parents=True)
    for part in ("batches", "feedback"):
        (run.config.folder / part).rename(again.folder / part)
    second = run_training(again, broker)
    assert len(run.pool.batches()) == len(second.pool.batches())
    asked = sorted((again.folder / "feedback").glob("*.json"))
    assert [path.stem for path in asked] == ["000000"]
    metrics = record.rows(again.folder / "metrics.jsonl")
    m, k = 2, 5  # images a sample; ceil(0.4 * 12) marginal samples
    assert [row["candidates"] for row in metrics] == [0, 0, m * k, m * k, m * k]


def test_offline_pool_of_everything_is_static_augmentation(tmp_path: Path, broker: str, checkpoint: Path, data: Path):
    with serving(tmp_path, broker, checkpoint, data) as url:
        settings = {"mode": "offline", "pool_match": "all", "vog": {"enabled": False}, "lookahead": {"enabled": False}}
        run = run_training(trainer_config(tmp_path / "runs", data, url, **settings), broker)
    metrics = record.rows(run.config.folder / "metrics.jsonl")
    assert [row["candidates"] for row in metrics] == [0, 0, 24, 24, 24]
    assert metrics[-1]["synthetic_rows"] == 2 * 24  # two epochs
