"""The identity tasks, whole: learnt from pictures of some people, and measured on others; with real pictures alone, and
with a generator's in every mode."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from protocol.bus import QueueConfig
from tests.generator_service.tiny_dit import CLASSES
from tests.generator_service.tiny_service import write_dataset
from tests.system.people import write_faces, write_market
from tests.system.test_exactness import Interrupted, same
from tests.system.whole import run_training, serving, trainer_config
from trainer import books, record, summary
from trainer.__main__ import main
from trainer.loop import train
from trainer.run import Run
from trainer.settings import TrainerConfig
from trainer.start import open_run

ADAM = {"kind": "adam", "learning_rate": 3e-3, "decay_epochs": [12]}


def real_config(folder: Path, root: Path, task: str, **settings: Any) -> TrainerConfig:
    plain: dict[str, Any] = {
        "runs_dir": folder,
        "dataset": {"root": root, "split": "train"},
        "task": task,
        "mode": "real",
        "device": "cpu",
        "threads": 1,
        "iterations": 2,
        "epochs": 4,
        "gradient_rows": 4,
    }
    if task == "reid":
        model = {"query_split": "query", "gallery_split": "gallery", "image_size": (32, 16)}
        plain |= {"batch_size": 16, "images_per_identity": 4, "optimizer": ADAM}
    else:
        pairs = {"name": "rendered", "layout": "csv", "root": str(root / "pairs")}
        model = {"pairs": [pairs], "image_size": (24, 24), "embedding": 32, "scale": 8.0}
        plain |= {"batch_size": 16, "optimizer": {"learning_rate": 0.05, "decay_epochs": [15]}}
    plain["model"] = {"model": "small_cnn", "shift": 1} | model
    return TrainerConfig.model_validate(plain | settings)


def trained(config: TrainerConfig, after_update: Any = lambda run: None) -> tuple[Run, dict[str, Any]]:
    """The run, and how good its model was before the first update."""
    with open_run(config, QueueConfig()) as (run, source):
        before = run.task.evaluate(run.test, run.predict, run.features)
        train(run, source, after_update)
    return run, before


def metrics(run: Run) -> list[dict[str, Any]]:
    return record.rows(run.config.folder / "metrics.jsonl")


# ---------------------------------------------------------------- real pictures alone


def test_reid_learns_to_find_people_it_never_saw(tmp_path: Path):
    root = write_market(tmp_path / "market")
    run, before = trained(real_config(tmp_path / "runs", root, "reid"))
    first, last = metrics(run)
    assert before["mAP"] < 0.4 and last["mAP"] > 0.8 and last["mAP"] >= first["mAP"] - 0.05
    assert last["rank1"] <= last["rank5"] <= last["rank10"] == last["cmc"][9] <= 1.0 and len(last["cmc"]) == 50
    assert (last["queries"], last["queries_without_match"]) == (12, 0)
    assert "test_top1" not in last and "train_val_gap" not in last and "corrupted" not in last
    assert last["updates"] == 2 * 4 * (16 * 12 // 16) and last["real_rows"] == 4 * 16 * 12
    told = summary.write(run.config.folder)
    assert (told.headline, told.score, told.test_top1) == ("mAP", last["mAP"], None)
    assert told.best_score == max(first["mAP"], last["mAP"])
    assert run.test[0].images.images.shape == (12, 32, 16, 3)


def test_face_learns_to_tell_people_it_never_saw(tmp_path: Path):
    root = write_faces(tmp_path / "faces")
    run, before = trained(real_config(tmp_path / "runs", root, "face", epochs=10))
    last = metrics(run)[-1]
    assert before["verification"] < 0.75 and last["verification"] > before["verification"] + 0.2
    assert last["verification_sets"].keys() == {"rendered"}
    assert last["verification_sets"]["rendered"]["accuracy"] == last["verification"]
    told = summary.write(run.config.folder)
    assert (told.headline, told.score) == ("verification", last["verification"])


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path):
    """Adam's moments, and batches of P identities with K pictures, go on where they were."""

    def stop(run: Run) -> None:
        if run.at.updates == 17:
            raise Interrupted

    root = write_market(tmp_path / "market", learnt=6, searched=3)
    settings = {"epochs": 2, "images_per_identity": 4, "batch_size": 8}
    whole, _ = trained(real_config(tmp_path / "whole", root, "reid", **settings))
    config = real_config(tmp_path / "halves", root, "reid", checkpoint_every=5, **settings)
    with pytest.raises(Interrupted):
        trained(config, stop)
    resumed, _ = trained(config)
    assert same(whole.model.state_dict(), resumed.model.state_dict())
    assert [row["mAP"] for row in metrics(whole)] == [row["mAP"] for row in metrics(resumed)]


# ---------------------------------------------------------------- with a generator


def write_people(root: Path) -> Path:
    """The checkpoint's classes to train on, one of them with a single picture; two others to find."""
    write_dataset(root / "train")
    for path in sorted((root / "train" / CLASSES[0]).iterdir())[1:]:
        path.unlink()
    made = write_dataset(root / "made", per_class=3)
    for split, numbers in (("query", (0,)), ("gallery", (1, 2))):
        for name, other in zip(CLASSES[:2], ("ann", "bob"), strict=True):
            (root / split / other).mkdir(parents=True)
            for number in numbers:
                (made / name / f"{number}.png").rename(root / split / other / f"{number}.png")
    return root


def task_settings(task: str, root: Path) -> dict[str, Any]:
    model: dict[str, Any] = {"model": "small_cnn", "image_size": (16, 8), "drop_rate": 0.2, "flip": True}
    model["random_erasing"] = 0.5
    if task == "face":
        pairs = "first,second,same,fold\n"
        for fold in range(2):
            pairs += f"ann/{fold + 1}.png,ann/{2 - fold}.png,1,{fold}\nann/{fold + 1}.png,bob/{fold + 1}.png,0,{fold}\n"
        (root / "gallery" / "pairs.csv").write_text(pairs)
        model |= {"embedding": 16, "flip_test": True}
        model["pairs"] = [{"name": "small", "layout": "csv", "root": str(root / "gallery")}]
        return {"task": task, "model": model, "batch_size": 6}
    model |= {"query_split": "query", "gallery_split": "gallery", "camera_exclusion": False}
    optimizer = {"kind": "adam", "learning_rate": 1e-3}
    return {"task": task, "model": model, "batch_size": 6, "images_per_identity": 2, "optimizer": optimizer}


@pytest.mark.parametrize("mode", ["sync", "async", "offline", "synthetic"])
@pytest.mark.parametrize("task", ["reid", "face"])
def test_every_mode(tmp_path: Path, broker: str, checkpoint: Path, task: str, mode: str):
    """VoG and lookahead choose among samples of the identities there are; one has one picture only."""
    root = write_people(tmp_path / "people")
    data = {"dataset": {"root": root, "split": "train"}}
    with serving(tmp_path, broker, checkpoint, root, **data) as url:
        settings = data | task_settings(task, root) | {"mode": mode, "iterations": 4, "epochs": 1}
        config = trainer_config(tmp_path / "runs", root, url, **settings)
        run = run_training(config, broker)
    rows = metrics(run)
    headline = {"reid": "mAP", "face": "verification"}[task]
    assert len(rows) == 4 and all(0.0 <= row[headline] <= 1.0 and row["headline"] == headline for row in rows)
    assert rows[-1]["candidates"] > 0 and rows[-1]["lookahead_seen"] >= rows[-1]["synthetic_rows"] > 0
    assert rows[-1]["gradient_synthetic"] > 0 and rows[-1]["loss_synthetic"] > 0
    written = record.Record.open(config.folder)
    assert {sample.class_name for sample in written.samples()} <= set(CLASSES)
    labels = {name: label for label, name in enumerate(run.task.classes)}
    assert all(labels[sample.class_name] == sample.label for sample in written.samples())
    assert books.balance(written).problems == []
    if mode == "sync" and task == "reid":
        fates = Counter(row["fate"] for row in written.selection)
        assert fates["vog"] > 0 and run.test[0].images.frame[:3] == (16, 8, False)


# ---------------------------------------------------------------- settings


CHECKED = [
    ('task = "reid"\nmodel = { query_split = "query" }', "go together"),
    ('task = "reid"\nmodel = { model = "resnet51" }', "unknown model 'resnet51'"),
    ('task = "reid"\nbatch_size = 64\nimages_per_identity = 5', "no multiple of images_per_identity"),
    ('task = "face"\nmodel = { pairs = [{ name = "x", layout = "rfw", root = "x" }] }', "African, Asian"),
    ('task = "reidd"', "unknown task 'reidd'; known: classification, face, reid"),
]


@pytest.mark.parametrize(("table", "told"), CHECKED)
def test_wrong_settings_are_told_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], table: str, told: str
):
    path = tmp_path / "run.toml"
    path.write_text(f'[trainer]\ndataset = {{ root = "nowhere" }}\n{table}\n')
    assert main(["--config", str(path), "--check"]) == 2
    assert told in capsys.readouterr().err


def test_right_settings_are_fine(tmp_path: Path):
    path = tmp_path / "run.toml"
    table = 'task = "reid"\nbatch_size = 64\nimages_per_identity = 4\n[trainer.model]\nmodel = "vit_base_patch16_224"\n'
    path.write_text(f'[trainer]\ndataset = {{ root = "nowhere" }}\n{table}')
    assert main(["--config", str(path), "--check"]) == 0


def test_the_optimizer_that_the_settings_name(tmp_path: Path):
    """Adam's virtual step is as long as the settings say."""
    root = write_market(tmp_path / "market", learnt=4, searched=2)
    config = real_config(tmp_path / "runs", root, "reid", iterations=1, epochs=1)
    with open_run(config, QueueConfig()) as (run, _):
        assert isinstance(run.optimizer, torch.optim.Adam) and run.optimizer.defaults["weight_decay"] == 5e-4
        assert run.virtual_lr(2e-3) == pytest.approx(0.2)
        named = config.model_copy(update={"lookahead": config.lookahead.model_copy(update={"virtual_lr": 0.7})})
        run.config = named
        assert run.virtual_lr(2e-3) == 0.7
