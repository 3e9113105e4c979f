"""What a run and a weight set give away, through the real system; and the filter that lets less through."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tomli_w
import torch
from PIL import Image
from pydantic import ValidationError

from agent import cli
from protocol.dataset import Dataset, DatasetConfig
from protocol.errors import ConfigError
from tests.generator_service.tiny_dit import CLASSES
from tests.system.whole import run_training, serving, trainer_config
from tests.trainer.test_report import Page
from trainer import record
from trainer.books import open_books
from trainer.pool import Pool, image
from trainer.privacy.__main__ import main
from trainer.privacy.assessment import Assessment
from trainer.report.__main__ import main as write_report
from trainer.settings import TrainerConfig
from trainer.summary import summarise

FILTER = {"privacy": {"filter": True, "quantile": 0.5}, "vog": {"fraction": 0.2}}


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_splits(tmp_path_factory.mktemp("splits"))


def write_splits(root: Path) -> Path:
    """Noise pictures to train on and others, held out."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for index in range(4):
                grey = rng.integers(0, 256, (8, 8), dtype=np.uint8)
                Image.fromarray(grey).save(root / split / name / f"{index}.png")
    return root


def of(splits: Path) -> dict[str, object]:
    return {"dataset": {"root": splits, "split": "train"}, "test_split": "test"}


def test_the_report_of_a_run(tmp_path: Path, broker: str, checkpoint: Path, splits: Path):
    """Synthetic samples that begin half way from a training image, by pixels and in the features of the own model."""
    with serving(tmp_path, broker, checkpoint, splits, dataset={"root": splits, "split": "train"}) as url:
        config = trainer_config(tmp_path / "runs", splits, url, **of(splits))
        run = run_training(config, broker)
    out = tmp_path / "privacy.html"
    assert main([str(config.folder), "--features", "own", "--out", str(out)]) == 0
    found = Assessment.model_validate_json(out.with_suffix(".json").read_bytes())
    trained = {row["id"] for row in record.rows(config.folder / "selection.jsonl") if row["kept"]}
    assert found.images == {"train": 12, "held_out": 12, "synthetic": len(trained)} and trained
    by_pixels, own = found.findings
    assert "the run's own model, which was trained on the training images" in own.caution
    assert by_pixels.membership.members == own.membership.members == 12

    train = Dataset.open(config.dataset)
    closest = by_pixels.closest[0]
    (candidate,) = run.pool.find([closest.synthetic_id])
    difference = (image(candidate) / 255.0 - train.image(closest.train_id) / 255.0) ** 2
    assert closest.distance == pytest.approx(np.sqrt(difference.mean()))
    every = run.pool.find(trained)
    mean = np.stack([train.image(row) for row in range(12)]) / 255.0
    nearest = min(np.sqrt(((image(made) / 255.0 - mean) ** 2).mean((1, 2, 3))).min() for made in every)
    assert closest.distance == pytest.approx(nearest)

    vectors = torch.nn.functional.normalize(run.features(run.real), dim=1)
    made = torch.nn.functional.normalize(run.features(run.with_pixels(every)), dim=1)
    apart = torch.cdist(made.double(), vectors.double()).min(1).values
    assert own.overall.synthetic.quantiles[0.0] == pytest.approx(apart.min().item(), abs=1e-4)
    assert own.overall.synthetic.quantiles[1.0] == pytest.approx(apart.max().item(), abs=1e-4)
    assert {section for section, _, _ in Page(out.read_text()).images} == {"By pixels", "By own"}


def limits_by_brute_force(train: Dataset, quantile: float) -> list[float]:
    """The quantile of each class's leave-one-out nearest distances."""
    found = []
    for label in range(len(train.classes)):
        own = [train.image(row) / 1.0 for row, entry in enumerate(train.samples) if entry.label == label]
        apart = [min(np.sqrt(((one - other) ** 2).sum()) for other in own if other is not one) for one in own]
        found.append(float(np.quantile(apart, quantile)))
    return found


def assert_dropped_as_brute_force_would(config: TrainerConfig, splits: Path) -> None:
    """For privacy, at the quantile 0.5 of pixel distances."""
    train, rows = (
        Dataset.open(DatasetConfig(root=splits, split="train")),
        record.rows(config.folder / "selection.jsonl"),
    )
    limits = limits_by_brute_force(train, 0.5)
    candidates = Pool(config.folder / "batches").find(row["id"] for row in rows)
    for candidate, row in zip(candidates, rows, strict=True):
        own = [train.image(at) / 1.0 for at, e in enumerate(train.samples) if e.label == candidate.sample.label]
        apart = min(np.sqrt(((image(candidate) - other) ** 2).sum()) for other in own)
        assert (row["fate"] == "privacy") == (apart <= limits[candidate.sample.label])


def test_a_filtered_run_keeps_books_that_balance(tmp_path: Path, broker: str, checkpoint: Path, splits: Path):
    with serving(tmp_path, broker, checkpoint, splits, dataset={"root": splits, "split": "train"}) as url:
        config = trainer_config(tmp_path / "runs", splits, url, **of(splits), **FILTER)
        run_training(config, broker)

    rows = record.rows(config.folder / "selection.jsonl")
    fates = Counter(row["fate"] for row in rows)
    assert fates["privacy"] and fates["trained"] and fates["vog"]
    books = open_books(config.folder, broker)
    assert books.balanced and books.fates["privacy"] == fates["privacy"] and not books.outstanding
    assert sum(books.fates.values()) == books.requested
    summary = summarise(config.folder)
    assert summary.privacy_dropped == fates["privacy"] and summary.balanced
    metrics = record.rows(config.folder / "metrics.jsonl")
    assert sum(row["privacy_dropped"] for row in metrics) == fates["privacy"]

    assert_dropped_as_brute_force_would(config, splits)

    out = tmp_path / "report.html"
    assert write_report([str(config.folder), "--out", str(out)]) == 0
    page = Page(out.read_text())
    assert f"{fates['privacy']} dropped as too near to a real sample" in page.text
    assert any(fate == "too-near" for _, fate, _ in page.images)


def test_the_filter_in_the_features_of_the_model(tmp_path: Path, broker: str, checkpoint: Path, splits: Path):
    settings = {"privacy": {"filter": True, "quantile": 0.9, "distance": "features"}, "iterations": 3}
    with serving(tmp_path, broker, checkpoint, splits, dataset={"root": splits, "split": "train"}) as url:
        config = trainer_config(tmp_path / "runs", splits, url, **of(splits), **settings)
        run_training(config, broker)
    fates = Counter(row["fate"] for row in record.rows(config.folder / "selection.jsonl"))
    assert fates["privacy"] and open_books(config.folder, broker).balanced


def test_images_that_thresholds_are_learnt_from_are_protected_too(
    tmp_path: Path, broker: str, checkpoint: Path, splits: Path
):
    """The generator was adapted on them all the same."""
    settings = {**FILTER, "thresholds": {"auto": True, "held_out": 0.5}, "iterations": 3}
    with serving(tmp_path, broker, checkpoint, splits, dataset={"root": splits, "split": "train"}) as url:
        config = trainer_config(tmp_path / "runs", splits, url, **of(splits), **settings)
        run = run_training(config, broker)
    assert len(run.real) == len(run.splits.held_out) == 6
    assert "privacy" in {row["fate"] for row in record.rows(config.folder / "selection.jsonl")}
    assert_dropped_as_brute_force_would(config, splits)


def test_mode_synthetic_has_nothing_to_compare_with(tmp_path: Path, data: Path):
    with pytest.raises(ValidationError, match=r"set privacy\.filter = false"):
        trainer_config(tmp_path, data, "", mode="synthetic", **FILTER)


def test_classes_of_one_image_have_nothing_to_go_by(tmp_path: Path, broker: str, checkpoint: Path, splits: Path):
    single = tmp_path / "single"
    for number, name in enumerate(CLASSES):
        (single / name).mkdir(parents=True)
        Image.fromarray(np.full((8, 8), 40 * number, dtype=np.uint8)).save(single / name / "0.png")
    with serving(tmp_path, broker, checkpoint, single) as url:
        config = trainer_config(tmp_path / "runs", single, url, **FILTER)
        with pytest.raises(ConfigError, match=r"no class has two: add some, or set privacy\.filter = false"):
            run_training(config, broker)


def test_a_weight_set_over_http(
    tmp_path: Path, broker: str, checkpoint: Path, splits: Path, capfd: pytest.CaptureFixture[str]
):
    dataset, out = {"root": str(splits), "split": "train"}, tmp_path / "out"
    settings = tmp_path / "service.toml"
    settings.write_text(tomli_w.dumps({"generator": {"dataset": dataset, "near_copy_distance": 0.5}}))
    with serving(tmp_path, broker, checkpoint, splits, dataset=dataset) as url:
        asked = ["--config", str(settings), "--url", url, "--out", str(out)]
        assert cli.main(["privacy", "none", *asked]) == 1
        told = capfd.readouterr().err
        assert "the service has no weights 'none'; it has" in told and not out.exists()
        name = told.split("it has ")[1].split("@")[0]
        assert cli.main(["privacy", name, *asked, "--samples", "20", "--seed", "5"]) == 0
    found = Assessment.model_validate_json((out / "privacy.json").read_bytes())
    assert found.images == {"train": 12, "held_out": 12, "synthetic": 20}
    assert found.title == f"{name}@1" and found.options.near_copy == 0.5
    lines = [json.loads(line) for line in (out / "samples" / "metadata.jsonl").read_text().splitlines()]
    assert [line["seed"] for line in lines] == list(range(5, 25))
    assert Counter(line["label"] for line in lines) == {"alpha": 7, "beta": 7, "gamma": 6}
    assert f"{name}@1" in Page((out / "privacy.html").read_text()).text
    assert sys.executable not in (out / "privacy.html").read_text()
