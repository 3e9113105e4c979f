"""`onthefly faces` on the drawn world: from what OpenFace would have written of it, and from its pixels."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tomli_w
from PIL import Image

from agent import cli
from agent.expressions.settings import ExpressionsConfig
from generator_service.expressions import Expressions
from generator_service.faces import __main__ as command
from generator_service.faces.identities import Identities
from generator_service.faces.interface import FacesConfig
from generator_service.faces.openface import UNITS as OPENFACE
from protocol.dataset import Dataset, DatasetConfig
from tests.expressions.portrait import UNITS
from tests.expressions.world import PROTOTYPES, Clip, draw, write_dataset
from tests.generator_service.faces.drawn import SIZE, WHO

COUNTS = {"anger": 4, "happiness": 8, "neutral": 4}


def write_openface(folder: Path, clips: list[Clip]) -> None:
    """CSV files of the truth: in OpenFace's units, which are the world's."""
    assert UNITS == OPENFACE
    for clip in clips:
        path = folder / f"{clip.relative}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [", ".join(["frame", "confidence", "success", *(f"{unit}_r" for unit in UNITS)])]
        for number, units in enumerate(clip.units, 1):
            shown = int(clip.flaw != "faceless")
            lines.append(", ".join(map(str, [number, 0.95 * shown, shown, *(5 * units)])))
        path.write_text("\n".join(lines))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("world")


@pytest.fixture(scope="module")
def world(place: Path) -> list[Clip]:
    clips = write_dataset(place / "data", seed=2, size=48, frames=6, counts=COUNTS, flawed=3)
    write_openface(place / "openface", clips)
    return clips


@pytest.fixture
def settings(tmp_path: Path, place: Path, world: list[Clip]) -> Path:
    faces = {"reader": "openface", "min_side": 32, "min_contrast": 8, "folder": str(tmp_path / "faces")}
    faces |= {"openface": {"folder": str(place / "openface")}}
    dataset = {"root": str(place / "data"), "split": "train", "layout": "clips"}
    path = tmp_path / "run.toml"
    path.write_text(tomli_w.dumps({"generator": {"faces": faces}, "trainer": {"dataset": dataset}}))
    return path


@pytest.fixture
def _in_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a process of its own would set up is left alone."""
    monkeypatch.setattr(command.logs, "setup", lambda name: None)
    monkeypatch.setattr(command.parent, "interruptible", lambda: None)
    yield


@pytest.mark.usefixtures("_in_process")
def test_the_command_finds_neutral_frames_and_tells_of_the_rest(
    settings: Path, world: list[Clip], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    became: list[list[str]] = []
    monkeypatch.setattr("os.execv", lambda program, arguments: became.append(arguments))
    cli.main(["faces", "--config", str(settings), "--set", "generator.faces.min_support=0.5"])
    ((_, flag, module, *arguments),) = became
    assert (flag, module) == ("-m", "generator_service.faces")
    assert command.main(arguments) == 0
    told = capsys.readouterr().out
    assert "16 of 19 clips have a neutral frame" in told
    for reason in ("1 no face", "1 dark", "1 blurred", "generator.faces.min_brightness"):
        assert reason in told
    rows = {
        line.split("│")[1].strip(): [part.strip() for part in line.split("│")]
        for line in told.splitlines()
        if "│" in line
    }
    assert rows["happiness"][2:4] == ["8", "8"]
    assert rows["neutral"][2:5] == ["7", "4", "none is frequent"]
    mined = json.loads((settings.parent / "faces/action_units.json").read_text())
    assert mined["classes"]["neutral"] == {"clips": 6, "patterns": []}  # of the faceless one nothing is known
    happy = mined["classes"]["happiness"]
    assert set().union(*(pattern["units"] for pattern in happy["patterns"])) <= set(PROTOTYPES["happiness"])
    apexes = [clip.units[np.argmax(clip.units.mean(1))] for clip in world if clip.emotion == "happiness"]
    for pattern in happy["patterns"]:
        columns = [UNITS.index(unit) for unit in pattern["units"]]
        having = [apex[columns] for apex in apexes if (apex[columns] >= 0.3).all()]
        assert pattern["part"] == len(having) / 8 >= 0.5
        assert list(pattern["units"].values()) == pytest.approx(np.mean(having, axis=0), abs=1e-3)


def test_the_frame_chosen_is_the_calmest_by_the_truth(tmp_path: Path, place: Path, world: list[Clip]):
    config = FacesConfig.model_validate(
        {"reader": "openface", "min_side": 32, "min_contrast": 8, "openface": {"folder": str(place / "openface")}}
    )
    dataset = Dataset.open(DatasetConfig(root=place / "data", split="train", layout="clips"))
    found = Identities.open(dataset, config, tmp_path / "faces")
    truth = {clip.relative: clip for clip in world}
    assert len(found) == 16
    for one in found:
        clip = truth[dataset.by_id(one.sample_id).relative]
        assert clip.flaw is None and one.subject == clip.who.name
        assert clip.units[one.frame].mean() == clip.units.mean(1).min() == pytest.approx(one.intensity, abs=1e-6)


def test_what_openface_wrote_of_the_dataset_reads_no_other_clips(tmp_path: Path, place: Path, world: list[Clip]):
    options = {"reader": "openface", "min_side": 32, "min_contrast": 8, "folder": tmp_path / "faces"}
    faces = FacesConfig.model_validate(options | {"openface": {"folder": place / "openface"}})
    dataset = Dataset.open(DatasetConfig(root=place / "data", split="train", layout="clips"))
    reads_all = SimpleNamespace(prompt_length=lambda text: None)
    found = Expressions.open(ExpressionsConfig(), faces, dataset, reads_all)
    assert found.identities and not found.reads_pixels
    assert Expressions.open(ExpressionsConfig(), None, dataset, reads_all).reads_pixels


def test_from_pixels_too_calm_frames_are_chosen(tmp_path: Path, trained: Path):
    """By a landmark model, which sees nothing of the world but its frames."""
    place = tmp_path / "data"
    clips = [draw("surprise", WHO, seed=seed, size=SIZE, frames=8) for seed in range(6)]
    clips += [
        draw("neutral", WHO, seed=9, size=SIZE, frames=8),
        draw("neutral", WHO, seed=8, size=SIZE, frames=8, flaw="dark"),
    ]
    for number, clip in enumerate(clips):
        folder = place / clip.emotion / f"{number:02}"
        folder.mkdir(parents=True)
        for at, frame in enumerate(clip.frames):
            Image.fromarray(frame).save(folder / f"{at:02}.png")
    table = {"min_side": 16, "min_contrast": 8, "unit_threshold": 0.1}  # so short a training reads weakly
    table |= {"landmarks": {"checkpoint": str(trained), "device": "cpu"}}
    dataset = Dataset.open(DatasetConfig(root=place, layout="clips"))
    found = Identities.open(dataset, FacesConfig.model_validate(table), tmp_path / "faces")
    assert found.report.usable == {"neutral": 1, "surprise": 6} and found.report.left_out == {"dark": 1}
    chosen = [clips[int(dataset.by_id(one.sample_id).path.name)].units[one.frame].mean() for one in found]
    assert np.mean(chosen) < 0.25 * np.mean([clip.units[-1].mean() for clip in clips[:6]])
    units = {unit for pattern in found.patterns["surprise"] for unit in pattern["units"]}
    assert {"AU02", "AU25", "AU26"} <= units


@pytest.mark.usefixtures("_in_process")
@pytest.mark.parametrize(
    ("change", "status", "told"),
    [
        ("generator.faces.readerr=1", 2, "did you mean 'reader'"),
        ("generator.faces.openface.folder=nowhere", 2, "no folder nowhere"),
        ("generator.faces.min_side=49", 1, "generator.faces.min_side: lower it"),
        ("generator.faces.min_brightness=230", 2, "leaves nothing below max_brightness"),
    ],
)
def test_what_is_wrong_is_told(settings: Path, change: str, status: int, told: str, capsys: pytest.CaptureFixture[str]):
    assert command.main(["--config", str(settings), "--set", change]) == status
    assert told in capsys.readouterr().err


@pytest.mark.usefixtures("_in_process")
def test_without_its_table_it_says_which(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "run.toml").write_text('[generator.dataset]\nroot = "x"\n')
    assert command.main(["--config", str(tmp_path / "run.toml")]) == 2
    assert "[generator.faces]" in capsys.readouterr().err
