"""What the modes train on: synthetic samples alone, pools made beforehand, what other criteria and filters choose."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from protocol.dataset import Dataset
from protocol.errors import ConfigError
from tests.system.test_exactness import Interrupted, same
from tests.system.whole import run_training, serving, trainer_config
from trainer import books, ready_made, record
from trainer.run import Run
from trainer.selection import similarity
from trainer.tasks.classification import Classification

PLAIN: dict[str, Any] = {"vog": {"enabled": False}, "lookahead": {"enabled": False}}
STATIC = PLAIN | {"mode": "offline", "pool_match": "all"}


def metrics(run: Run) -> list[dict[str, Any]]:
    return record.rows(run.config.folder / "metrics.jsonl")


# ---------------------------------------------------------------- synthetic only


def pictures(dataset: Dataset) -> set[bytes]:
    return {np.asarray(dataset.image(index)).tobytes() for index in range(len(dataset))}


def test_no_real_picture_reaches_the_model_in_mode_synthetic(
    tmp_path: Path, broker: str, checkpoint: Path, data: Path, monkeypatch: pytest.MonkeyPatch
):
    """The pool takes their place: it is trained on, scored and asked about; each answer starts from a member of it."""
    seen: set[bytes] = set()  # every picture that is made a model's input
    preprocess = Classification.preprocess

    def watched(task: Classification, images: torch.Tensor) -> torch.Tensor:
        seen.update(image.numpy().tobytes() for image in images)
        return preprocess(task, images)

    monkeypatch.setattr(Classification, "preprocess", watched)
    monkeypatch.setattr("trainer.data.splits.RealImages", None)  # nor are they read to train on
    with serving(tmp_path, broker, checkpoint, data) as url:
        config = trainer_config(tmp_path / "runs", data, url, mode="synthetic")
        run = run_training(config, broker)
    dataset = Dataset.open(config.dataset)
    assert not seen & pictures(dataset)
    real = {image.numpy().tobytes() for image in run.real.images}
    assert len(run.real) == len(dataset) == 12 and real <= seen
    assert sorted(run.real.labels.tolist()) == sorted(entry.label for entry in dataset.samples)

    written = record.Record.open(config.folder)
    pool = {sample.id: sample for sample in written.samples() if sample.feedback == 0}
    assert {sample.source_id for sample in pool.values()} == {entry.id for entry in dataset.samples}
    assert [feedback.feedback for feedback in written.feedback] == [0, 2, 3, 4]
    for feedback in written.feedback[1:]:
        assert len(feedback.samples) == 5  # ceil(0.4 * 12)
        assert all(asked.sample_id in pool and asked.pixels is not None for asked in feedback.samples)
    assert {sample.source_id for sample in written.samples() if sample.feedback} <= pool.keys()
    assert [row["candidates"] for row in metrics(run)] == [0, 0, 10, 10, 10]
    account = books.open_books(config.folder, broker)
    assert (account.problems, account.fates["pool"], account.balanced) == ([], 12, True)


def test_a_resumed_synthetic_run_is_the_uninterrupted_one(tmp_path: Path, broker: str, checkpoint: Path, data: Path):
    def stop(run: Run) -> None:
        if run.at.updates == 16:
            raise Interrupted

    with serving(tmp_path, broker, checkpoint, data) as url:
        whole = run_training(trainer_config(tmp_path / "whole", data, url, mode="synthetic"), broker)
        config = trainer_config(tmp_path / "halves", data, url, mode="synthetic", checkpoint_every=3)
        with pytest.raises(Interrupted):
            run_training(config, broker, stop)
        resumed = run_training(config, broker)
    assert same(whole.model.state_dict(), resumed.model.state_dict())
    assert books.open_books(config.folder, broker).balanced


# ---------------------------------------------------------------- pools


def test_real_fake_trains_on_r_synthetic_samples_a_real_one(tmp_path: Path, broker: str, checkpoint: Path, data: Path):
    """The static baseline of Figure 4 and Table 15, 1:1 to 1:10."""
    with serving(tmp_path, broker, checkpoint, data) as url:
        for r in (1, 10):
            settings = STATIC | {"feedback": {"images_per_sample": r}, "epochs": 1, "iterations": 3, "run": f"r{r}"}
            run = run_training(trainer_config(tmp_path / "runs", data, url, **settings), broker)
            assert [row["candidates"] for row in metrics(run)] == [0, 0, r * 12]
            assert (metrics(run)[-1]["real_rows"], metrics(run)[-1]["synthetic_rows"]) == (12, r * 12)


def test_a_pool_serves_another_run_and_nothing_is_made_again(
    tmp_path: Path, broker: str, checkpoint: Path, data: Path, capsys: pytest.CaptureFixture[str]
):
    with serving(tmp_path, broker, checkpoint, data) as url:
        first = run_training(trainer_config(tmp_path / "runs", data, url, **STATIC), broker)
    assert ready_made.main([str(first.config.folder)]) == 0
    told = capsys.readouterr().out
    weights = first.pool.everything()[0].sample.weights
    assert [line.split() for line in told.splitlines()] == [
        ["pool", "of", "run", "run"],
        ["samples", "24"],
        ["real", "samples", "12"],
        ["of", "each", "2"],
        ["near", "copies", "0"],
        ["failed", "0"],
        *[["class", name, "8"] for name in sorted({entry.class_name for entry in first.splits.dataset.samples})],
        ["made", "by", str(weights), f"({weights.digest[:12]}):", "24"],
    ]
    # neither service nor broker is there any more
    settings = STATIC | {"pool_from": first.config.folder, "run": "other"}
    config = trainer_config(tmp_path / "runs", data, url, **settings)
    other = run_training(config, "redis://127.0.0.1:1")
    assert [c.sample.id for c in other.pool.everything()] == [c.sample.id for c in first.pool.everything()]
    assert same(other.model.state_dict(), first.model.state_dict())
    account = books.open_books(config.folder)
    assert (account.problems, account.balanced) == ([], True)
    assert same(run_training(config, "redis://127.0.0.1:1").model.state_dict(), first.model.state_dict())  # it is over

    three = settings | {"run": "third", "feedback": {"images_per_sample": 3}}
    with pytest.raises(ConfigError, match="has 2 images of each real sample, and 3 are wanted"):
        run_training(trainer_config(tmp_path / "runs", data, url, **three), broker)
    synthetic = {"mode": "synthetic", "pool_from": first.config.folder, "run": "fourth"}
    with pytest.raises(ConfigError, match="has 2 images of each real sample, and 1 are wanted"):
        run_training(trainer_config(tmp_path / "runs", data, url, **synthetic), broker)


# ---------------------------------------------------------------- criteria and filters


def test_the_internet_explorer_arm(tmp_path: Path, broker: str, checkpoint: Path, data: Path):
    """Similarity asks and filters, in the features of the model as it is when the iteration begins."""
    settings = {
        "vog": {"enabled": False},
        "feedback": {"criterion": "similarity", "fraction": 0.4},
        "similarity": {"enabled": True, "neighbours": 3, "fraction": 0.3},
        "iterations": 3,
    }
    before: dict[str, torch.Tensor] = {}

    def remember(run: Run) -> None:
        if run.at.iteration == 1:
            before.update({name: value.clone() for name, value in run.model.state_dict().items()})

    with serving(tmp_path, broker, checkpoint, data) as url:
        run = run_training(trainer_config(tmp_path / "runs", data, url, **settings), broker, remember)
    run.model.load_state_dict(before)
    real = run.features(run.real)
    written = record.Record.open(run.config.folder)
    nearest = similarity.among(real, 3)
    expected = [run.real.dataset.samples[i].id for i in torch.argsort(-nearest, stable=True)[:5].tolist()]
    assert [sample.sample_id for sample in written.feedback[-1].samples] == expected

    rows = {row["id"]: row for row in written.selection if row["iteration"] == 2}
    candidates = run.pool.find(rows)
    scores = similarity.to_targets(run.features(run.with_pixels(candidates)), real, 3)
    assert [rows[c.sample.id]["similarity"] for c in candidates] == pytest.approx(scores.tolist(), abs=1e-6)
    per_class = Counter(row["class"] for row in rows.values())
    dropped = Counter(row["class"] for row in rows.values() if row["fate"] == "similarity")
    assert dropped == Counter({name: int(0.3 * n) for name, n in per_class.items() if int(0.3 * n)})
    for name in dropped:
        of_class = [(row["similarity"], row["kept"]) for row in rows.values() if row["class"] == name]
        assert max(s for s, kept in of_class if not kept) <= min(s for s, kept in of_class if kept)
    row = metrics(run)[-1]
    assert (row["vog_dropped"], row["similarity_dropped"]) == (0, sum(dropped.values()))
    assert books.open_books(run.config.folder, broker).balanced


def test_a_part_of_each_class(tmp_path: Path, broker: str, checkpoint: Path, data: Path):
    settings = {"feedback": {"fraction": 0.3, "per_class": True}, "iterations": 3}
    with serving(tmp_path, broker, checkpoint, data) as url:
        run = run_training(trainer_config(tmp_path / "runs", data, url, **settings), broker)
    (asked,) = record.Record.open(run.config.folder).feedback
    assert Counter(sample.label for sample in asked.samples) == {0: 2, 1: 2, 2: 2}  # ceil(0.3 * 4)
    scores = [sample.score for sample in asked.samples]
    assert scores == sorted(scores)


def test_a_class_that_loses_every_sample_is_named(tmp_path: Path, broker: str, checkpoint: Path, data: Path):
    """All are near copies by the service's threshold; the run goes on with real samples."""
    with serving(tmp_path, broker, checkpoint, data, near_copy_distance=1.0) as url:
        config = trainer_config(tmp_path / "runs", data, url, drop_near_copies=True, iterations=3)
        run = run_training(config, broker)
    row = metrics(run)[-1]
    assert (row["candidates"], row["near_copies"], row["synthetic_rows"]) == (10, 10, 0)
    events = [row for row in record.rows(config.folder / "events.jsonl") if row["event"] == "class_emptied"]
    came = Counter(row["class"] for row in record.rows(config.folder / "selection.jsonl"))
    assert [(event["iteration"], event["class_name"]) for event in events] == [(2, name) for name in sorted(came)]
    assert f"all {came[events[0]['class_name']]} synthetic samples of class" in events[0]["message"]


# ---------------------------------------------------------------- thresholds


LEARNT = {
    "thresholds": {"auto": True, "held_out": 0.3, "asked": [0.3, 0.5], "dropped": [0.0, 0.5]},
    "iterations": 6,
    "epochs": 1,
}


def test_thresholds_are_learnt_from_held_out_samples(tmp_path: Path, broker: str, checkpoint: Path, data: Path):
    with serving(tmp_path, broker, checkpoint, data) as url:
        run = run_training(trainer_config(tmp_path / "runs", data, url, mode="async", **LEARNT), broker)
    assert Counter(run.splits.held_out.labels.tolist()) == {0: 1, 1: 1, 2: 1}  # floor(0.3 * 4)
    held_out = {entry.id for entry in run.splits.held_out.dataset.samples}
    written = record.Record.open(run.config.folder)
    assert not held_out & {sample.sample_id for feedback in written.feedback for sample in feedback.samples}
    rows = metrics(run)
    assert all(row["real_rows"] == 9 for row in rows)
    gains = [row["held_out_value"] - before["held_out_value"] for before, row in itertools.pairwise(rows)]
    assert [row["held_out_gain"] for row in rows[1:]] == pytest.approx(gains)
    assert all("asked_part" not in row for row in rows[:2])
    assert {row["asked_part"] for row in rows[2:]} == {0.3, 0.5} and {row["dropped_part"] for row in rows[2:]} == {
        0.0,
        0.5,
    }
    asked = {feedback.feedback: len(feedback.samples) for feedback in written.feedback}
    for row in rows[2:]:
        assert asked[row["iteration"] - run.config.staleness] == {0.3: 3, 0.5: 5}[row["asked_part"]]
        assert (row["vog_dropped"] > 0) == (row["dropped_part"] == 0.5)


def test_resumed_thresholds_are_the_uninterrupted_ones(tmp_path: Path, broker: str, checkpoint: Path, data: Path):
    def stop(run: Run) -> None:
        if run.at.iteration == 3:
            raise Interrupted

    settings = LEARNT | {"iterations": 5}
    with serving(tmp_path, broker, checkpoint, data) as url:
        whole = run_training(trainer_config(tmp_path / "whole", data, url, **settings), broker)
        config = trainer_config(tmp_path / "halves", data, url, **settings)
        with pytest.raises(Interrupted):
            run_training(config, broker, stop)
        resumed = run_training(config, broker)
    assert metrics(whole) == metrics(resumed)
    assert same(whole.model.state_dict(), resumed.model.state_dict())
    with pytest.raises(ConfigError, match="another thresholds"):
        run_training(config.model_copy(update={"thresholds": trainer_config(tmp_path, data, url).thresholds}), broker)
