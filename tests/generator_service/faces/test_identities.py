"""The neutral frame of each clip, what is left out and why, and going on after an interruption."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from generator_service import json_lines
from generator_service.faces.identities import Identities
from generator_service.faces.interface import FacesConfig
from protocol.dataset import Dataset, DatasetConfig
from protocol.errors import ConfigError, DiskFull, NoFace
from tests.generator_service.faces.drawn import RedReader, StoredReader

CONFIG = FacesConfig(
    min_side=8, min_sharpness=20, min_brightness=20, max_brightness=200, min_contrast=5, unit_threshold=0.2
)
CHECKS = np.indices((16, 16)).sum(0) % 2 * 60  # sharp, and of enough contrast


def frame(red: int, texture: np.ndarray = CHECKS, green: int = 60) -> np.ndarray:
    """uint8 [16, 16, 3]: red says how strong its expression is, in `RedReader`."""
    picture = np.zeros((16, 16, 3))
    picture[..., 0], picture[..., 1], picture[..., 2] = red, green + texture, green
    return picture.clip(0, 255).astype(np.uint8)


FLAT, COARSE = np.zeros((16, 16)), np.repeat(np.linspace(0, 120, 16)[None], 16, axis=0)
CLIPS = {
    "happy/rising": [frame(50), frame(20), frame(200)],
    "happy/faceless": [frame(0, green=90), frame(0, green=80), frame(30, FLAT)],  # and one frame without contrast
    "neutral/still": [frame(90), frame(80), frame(80)],
    "neutral/dark": [frame(10, CHECKS / 2, green=0)] * 2,
    "neutral/bright": [frame(255, -CHECKS, green=255)] * 2,
    "neutral/blurred": [frame(70, COARSE)] * 2,
    "neutral/grey": [frame(70, FLAT)] * 2,
}


def write(folder: Path, clips: dict[str, list[np.ndarray]] = CLIPS) -> DatasetConfig:
    for name, frames in clips.items():
        (folder / name).mkdir(parents=True)
        for number, picture in enumerate(frames):
            Image.fromarray(picture).save(folder / name / f"{number:03}.png")
    return DatasetConfig(root=folder, layout="clips")


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return Dataset.open(write(tmp_path / "data"))


def test_the_calmest_frame_that_passes_the_gates_is_chosen(dataset: Dataset, tmp_path: Path):
    found = Identities.open(dataset, CONFIG, tmp_path / "faces", reader=RedReader())
    assert [(one.class_name, one.label, one.frame) for one in found] == [("happy", 0, 1), ("neutral", 1, 1)]
    assert found[0].intensity == pytest.approx(20 / 255, abs=1e-6)
    assert found[0].sample_id == dataset.samples[1].id and dataset.samples[1].relative == "happy/rising"
    np.testing.assert_array_equal(found.image(found[0]), CLIPS["happy/rising"][1])
    assert found.report.left_out == {"no_face": 1, "dark": 1, "bright": 1, "blurred": 1, "low_contrast": 1}
    assert (found.report.clips, found.report.usable) == ({"happy": 2, "neutral": 5}, {"happy": 1, "neutral": 1})
    assert str(found.report).startswith("2 of 7 clips have a neutral frame; left out: ")


def test_a_calmer_frame_that_fails_a_gate_is_not(tmp_path: Path):
    clips = {"a/1": [frame(40), frame(10, FLAT)], "b/1": [frame(40)]}
    found = Identities.open(Dataset.open(write(tmp_path / "data", clips)), CONFIG, tmp_path / "f", reader=RedReader())
    assert [one.frame for one in found] == [0, 0]


def test_what_was_found_is_not_looked_for_again(dataset: Dataset, tmp_path: Path):
    first = Identities.open(dataset, CONFIG, tmp_path / "faces", reader=RedReader())
    reader = RedReader()
    again = Identities.open(dataset, CONFIG, tmp_path / "faces", reader=reader)
    assert reader.clips == 0
    assert list(again) == list(first) and again.report == first.report and again.patterns == first.patterns
    other = CONFIG.model_copy(update={"min_sharpness": 0.0})
    assert len(Identities.open(dataset, other, tmp_path / "faces", reader=reader)) == 3
    assert reader.clips == len(CLIPS)  # other settings, other findings


class Interrupted(RedReader):
    def read(self, frames, neutral=None):
        if self.clips == 3:
            raise KeyboardInterrupt
        return super().read(frames, neutral)


def test_an_interrupted_search_goes_on(dataset: Dataset, tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        Identities.open(dataset, CONFIG, tmp_path / "faces", reader=Interrupted())
    (path,) = (tmp_path / "faces").glob("clips-*.jsonl")
    path.write_bytes(path.read_bytes()[:-9])  # killed while the last of three was written
    reader = RedReader()
    steps: list[tuple[int, int]] = []
    found = Identities.open(
        dataset, CONFIG, tmp_path / "faces", reader=reader, on_clip=lambda done, total: steps.append((done, total))
    )
    assert reader.clips == len(CLIPS) - 2
    assert steps == [(done, 7) for done in range(2, 8)]
    assert list(found) == list(Identities.open(dataset, CONFIG, tmp_path / "other", reader=RedReader()))


def test_clips_that_cannot_be_read_any_more_are_tried_anew(dataset: Dataset, tmp_path: Path):
    shutil.move(tmp_path / "data/neutral/still", tmp_path / "away")
    found = Identities.open(dataset, CONFIG, tmp_path / "faces", reader=RedReader())
    assert [one.class_name for one in found] == ["happy"] and found.report.left_out["undecodable"] == 1
    shutil.move(tmp_path / "away", tmp_path / "data/neutral/still")
    assert len(Identities.open(dataset, CONFIG, tmp_path / "faces", reader=RedReader())) == 2


def test_clips_that_do_not_decode_count_as_left_out(tmp_path: Path):
    place = write(tmp_path / "data")
    (tmp_path / "data/happy/damaged").mkdir()
    (tmp_path / "data/happy/damaged/000.png").write_text("no picture")
    found = Identities.open(Dataset.open(place), CONFIG, tmp_path / "faces", reader=RedReader())
    assert found.report.left_out["undecodable"] == 1


def test_stored_readings_need_no_pixels_read(dataset: Dataset, tmp_path: Path):
    reader = StoredReader({"happy/rising": [0.5, 0.6, 0.1], "neutral/still": [0.2, 0.0, 0.3]})
    found = Identities.open(dataset, CONFIG, tmp_path / "faces", reader=reader)
    assert [(one.frame, one.intensity) for one in found] == [(2, 0.1), (1, 0.0)]
    assert found.report.left_out == {"unread": 5}


def test_long_clips_are_looked_at_in_part(tmp_path: Path):
    clips = {"a/1": [frame(100 - number) for number in range(9)], "b/1": [frame(40)]}
    config = CONFIG.model_copy(update={"max_frames": 3})
    found = Identities.open(Dataset.open(write(tmp_path / "data", clips)), config, tmp_path / "f", reader=RedReader())
    assert found[0].frame == 7  # of 1, 4 and 7


def test_nothing_usable_says_which_gate_to_open(tmp_path: Path):
    clips = {name: CLIPS[name] for name in ("happy/faceless", "neutral/dark", "neutral/grey")}
    clips["neutral/darker"] = clips["neutral/dark"]
    dataset = Dataset.open(write(tmp_path / "data", clips))
    with pytest.raises(NoFace, match=r"0 of 4 clips .* 2 dark.*lower it") as error:
        Identities.open(dataset, CONFIG, tmp_path / "faces", reader=RedReader())
    assert "generator.faces.min_brightness" in error.value.message
    small = CONFIG.model_copy(update={"min_side": 17})
    with pytest.raises(NoFace, match=r"generator.faces.min_side"):
        Identities.open(dataset, small, tmp_path / "faces", reader=RedReader())


def test_action_units_at_the_apex_are_counted(tmp_path: Path):
    clips = {f"happy/{number}": [frame(10), frame(100 + 51 * number)] for number in range(3)}
    clips |= {f"calm/{number}": [frame(10), frame(20)] for number in range(3)}
    found = Identities.open(Dataset.open(write(tmp_path / "data", clips)), CONFIG, tmp_path / "f", reader=RedReader())
    expected = {"units": {"AU12": round(151 / 255, 4)}, "part": 1.0}
    assert found.patterns == {"calm": [], "happy": [expected]}
    told = json.loads((tmp_path / "f" / "action_units.json").read_text())
    assert told["units"] == ["AU12"] and told["classes"]["happy"] == {"clips": 3, "patterns": [expected]}


def test_a_full_disk_is_told(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json_lines.os, "fsync", full)
    with pytest.raises(DiskFull, match="clips-"):
        Identities.open(dataset, CONFIG, tmp_path / "faces", reader=RedReader())


def test_images_have_no_neutral_frames(tmp_path: Path):
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.fromarray(frame(9)).save(tmp_path / name / "1.png")
    dataset = Dataset.open(DatasetConfig(root=tmp_path))
    with pytest.raises(ConfigError, match="layout"):
        Identities.open(dataset, CONFIG, tmp_path / "faces", reader=RedReader())
