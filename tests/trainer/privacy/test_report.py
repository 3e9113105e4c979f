from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import tomli_w
import torch
import torch.nn.functional as F
from PIL import Image

from protocol.dataset import Dataset, DatasetConfig
from protocol.errors import ConfigError
from tests.trainer.privacy.sets import balanced, drawn, noisy, subject
from tests.trainer.run_folder import RunFolder, write_dataset, write_run
from tests.trainer.test_report import Page
from trainer.privacy import report, spaces
from trainer.privacy.__main__ import main
from trainer.privacy.assessment import Assessment, Options
from trainer.record import rows


def write_split(folder: Path, seed: int, classes: tuple[str, ...] = ("cat", "dog"), each: int = 4) -> None:
    draw = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(each):
            Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / name / f"{number}.png")


@pytest.fixture
def data(tmp_path: Path) -> DatasetConfig:
    write_dataset(tmp_path / "data")
    write_split(tmp_path / "data" / "test", 1)
    return DatasetConfig(root=tmp_path / "data", split="train")


@pytest.fixture
def run(tmp_path: Path, data: DatasetConfig) -> RunFolder:
    return write_run(tmp_path / "run", Dataset.open(data), data)


def examined(out: Path) -> tuple[Assessment, Page]:
    return Assessment.model_validate_json(out.with_suffix(".json").read_bytes()), Page(out.read_text())


# ---------------------------------------------------------------- the page


def test_the_page_shows_what_was_found(tmp_path: Path):
    labels = balanced(12)
    train, out = drawn(0, labels), tmp_path / "privacy.html"
    made = noisy(train, 1.0)
    about = subject(train, drawn(1, labels), made)
    found = report.write(about, ["pixels"], Options(), out)
    told, page = examined(out)
    assert told == found
    assert "<of>" in page.text and "weights@1" in page.text  # texts from elsewhere are escaped
    assert f"{found.findings[0].membership.auc:.2f}" in page.text
    assert "better than by guessing" in page.text and "more than the 5.0 %" in page.text
    pairs = page.shown("By pixels")
    assert len(pairs) == 2 * 12
    for pair, (_, synthetic), (_, real) in zip(found.findings[0].closest, pairs[::2], pairs[1::2], strict=True):
        assert np.array_equal(synthetic, made[pair.synthetic]) and np.array_equal(real, train[pair.train])
    charts = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    assert len(charts) == 3 and "ROC" in charts[2]
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert "http" not in out.read_text().replace("http://www.w3.org", "")
    assert "keep it as private as they are" in page.text


def test_no_leak_is_not_called_one(tmp_path: Path):
    labels = balanced(20)
    about = subject(drawn(0, labels), drawn(1, labels), drawn(2, labels))
    report.write(about, [], Options(), tmp_path / "privacy.html")
    assert "no sign that an attacker tells training images from others" in examined(tmp_path / "privacy.html")[1].text


def test_pictures_too_large_are_made_smaller(tmp_path: Path):
    big = np.random.default_rng(0).integers(0, 256, (4, 400, 200, 3), dtype=np.uint8)
    about = subject(big, big[::-1].copy(), noisy(big, 3.0), [[0, 1, 2, 2], [2, 2, 1, 0], [0, 1, 2, 2]])
    report.write(about, [], Options(), tmp_path / "privacy.html")
    assert {pixels.shape for _, pixels in examined(tmp_path / "privacy.html")[1].shown("By")} == {(160, 80, 3)}


# ---------------------------------------------------------------- a run


def test_a_run_is_examined_by_what_it_trained_on(tmp_path: Path, run: RunFolder, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "privacy.html"
    assert main([str(run.folder), "--out", str(out), "--quantile", "0.2", "--seed", "3"]) == 0
    found, page = examined(out)
    trained = {row["id"] for row in rows(run.folder / "selection.jsonl") if row["kept"]}
    assert found.images == {"train": 10, "held_out": 8, "synthetic": len(trained)} and len(trained) == 8
    assert {pair.synthetic_id for pair in found.findings[0].closest} == trained
    assert (found.train_split, found.held_out_split, found.title) == ("train", "test", "run")
    assert (found.options.quantile, found.options.seed) == (0.2, 3)
    assert "area under the ROC" in capsys.readouterr().out
    dataset = Dataset.open(run.config.dataset)
    shown = page.shown("By pixels")[1][1]
    assert np.array_equal(shown, dataset.image(found.findings[0].closest[0].train_id))


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err


def test_a_run_without_synthetic_samples(tmp_path: Path, data: DatasetConfig, capsys: pytest.CaptureFixture[str]):
    real = RunFolder(tmp_path / "real", Dataset.open(data), data, mode="real")
    assert "trained on no synthetic samples" in refused(capsys, real.folder, "--out", tmp_path / "p.html")
    assert not (tmp_path / "p.html").exists()


def test_no_held_out_split(tmp_path: Path, run: RunFolder, data: DatasetConfig, capsys: pytest.CaptureFixture[str]):
    out = ("--out", tmp_path / "p.html")
    assert "has no split 'unseen'" in refused(capsys, run.folder, "--held-out", "unseen", *out)
    assert "--held-out train is not held out" in refused(capsys, run.folder, "--held-out", "train", *out)
    bare = write_run(tmp_path / "bare", Dataset.open(data), data, test_split="")
    assert "no split of them is named: say --held-out SPLIT" in refused(capsys, bare.folder, *out)


def test_classes_that_do_not_match(tmp_path: Path, run: RunFolder, capsys: pytest.CaptureFixture[str]):
    root = run.config.dataset.root
    write_split(root / "partly", 2, ("dog", "emu"))
    told = refused(capsys, run.folder, "--held-out", "partly", "--out", tmp_path / "p.html")
    assert "--held-out partly" in told and "or none of them" in told


def test_a_held_out_split_of_others_is_compared_overall(
    tmp_path: Path, run: RunFolder, capsys: pytest.CaptureFixture[str]
):
    write_split(run.config.dataset.root / "others", 2, ("ape", "emu", "owl"))
    out = tmp_path / "p.html"
    assert main([str(run.folder), "--held-out", "others", "--out", str(out)]) == 0
    assert "warning: The held-out images show other classes" in capsys.readouterr().err
    found, page = examined(out)
    assert found.findings[0].within_class is None and found.images["held_out"] == 12
    assert "drawn whatever their class" in page.text and "of the same class" not in page.text.split("How this")[0]


def test_a_single_held_out_image(tmp_path: Path, run: RunFolder, capsys: pytest.CaptureFixture[str]):
    write_split(run.config.dataset.root / "one", 2, ("ape",), each=1)
    told = refused(capsys, run.folder, "--held-out", "one", "--out", tmp_path / "p.html")
    assert "only one held-out (one) image" in told


def test_arguments_that_say_nothing_or_too_much(tmp_path: Path, run: RunFolder, capsys: pytest.CaptureFixture[str]):
    assert "either the folder of a run" in refused(capsys, "--out", tmp_path / "p.html")
    assert "either the folder of a run" in refused(capsys, run.folder, "--samples", tmp_path)
    assert "holds no run" in refused(capsys, tmp_path, "--out", tmp_path / "p.html")
    assert "cannot be the page" in refused(capsys, run.folder, "--out", tmp_path / "none" / "p.html")
    assert "cannot be the page" in refused(capsys, run.folder, "--out", tmp_path / "p.json")
    assert "options.quantile" in refused(capsys, run.folder, "--quantile", "1.5", "--out", tmp_path / "p.html")
    assert "names no dataset" in refused(capsys, "--samples", tmp_path, "--out", tmp_path / "p.html")


# ---------------------------------------------------------------- a folder of samples


def test_a_folder_of_samples(tmp_path: Path, data: DatasetConfig):
    write_split(tmp_path / "made", 3, each=6)
    settings, out = tmp_path / "service.toml", tmp_path / "p.html"
    settings.write_text(tomli_w.dumps({"generator": {"dataset": {"root": str(data.root), "split": "train"}}}))
    arguments = ["--samples", str(tmp_path / "made"), "--config", str(settings), "--held-out", "test"]
    assert main([*arguments, "--title", "mine@2", "--out", str(out)]) == 0
    found, page = examined(out)
    assert found.title == "mine@2" and found.images == {"train": 10, "held_out": 8, "synthetic": 12}
    assert "mine@2" in page.text


def test_samples_of_other_classes(tmp_path: Path, data: DatasetConfig, capsys: pytest.CaptureFixture[str]):
    write_split(tmp_path / "made", 3, ("cat", "dog", "emu"))
    dataset = f"trainer.dataset={{root = {json.dumps(str(data.root))}, split = 'train'}}"
    told = refused(
        capsys, "--samples", tmp_path / "made", "--set", dataset, "--held-out", "test", "--out", tmp_path / "p.html"
    )
    assert "'emu' is outside the 2 classes" in told


# ---------------------------------------------------------------- features


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A timm model in a folder, as timm saves it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("timm")
    timm.models.save_for_hf(timm.create_model("test_vit", num_classes=5), folder, safe_serialization=True)
    return folder


def test_features_of_a_timm_model(tmp_path: Path, published: Path):
    labels = balanced(6)
    train = drawn(0, labels)
    about = subject(train, drawn(1, labels), noisy(train, 2.0))
    name = f"timm:local-dir:{published}"
    found = report.write(about, ["pixels", name, name], Options(), tmp_path / "privacy.html")
    assert [findings.space for findings in found.findings] == ["pixels", name]
    assert found.findings[1].membership.auc > 0.9
    space = spaces.named(name, None)
    vectors = space.vectors(about.train)
    model = timm.create_model(name.removeprefix("timm:"), pretrained=True, num_classes=0).eval()
    told = timm.data.resolve_data_config({}, model=model)
    transform = timm.data.create_transform(**{**told, "crop_pct": 1.0})
    with torch.no_grad():
        own = F.normalize(model(torch.stack([transform(Image.fromarray(picture)) for picture in train])))
    assert (vectors * own).sum(1).min() > 0.999  # timm's own transform, but for how it rounds
    nearest = (vectors[None] - space.vectors(about.synthetic)[:, None]).norm(dim=2).min(1).values
    assert found.findings[1].overall.synthetic.quantiles[0.0] == pytest.approx(nearest.min().item(), abs=1e-6)
    assert "By timm:local-dir" in examined(tmp_path / "privacy.html")[1].text


def test_features_that_are_not_to_be_had(tmp_path: Path, run: RunFolder, capsys: pytest.CaptureFixture[str]):
    out = ("--out", tmp_path / "p.html")
    for name in ("timm:no_such_model", "timm:local-dir:/none"):
        assert "cannot get the weights" in refused(capsys, run.folder, "--features", name, *out)
    assert "neither" in refused(capsys, run.folder, "--features", "clip", *out)
    assert "has no checkpoint" in refused(capsys, run.folder, "--features", "own", *out)
    about = subject(*(drawn(seed, balanced(2)) for seed in range(3)))
    with pytest.raises(ConfigError, match="is the model of a run"):
        report.write(replace(about, run=None), ["own"], Options(), tmp_path / "p.html")
