"""OpenFace's CSV files as it writes them, and its program, played here by a script."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from generator_service.faces.interface import FacesConfig, open_reader
from generator_service.faces.openface import UNITS, Config, OpenFaceReader
from protocol.errors import BadFile, ConfigError, GenerationFailed

HEADER = ["frame", "timestamp", "confidence", "success"]
HEADER += [f"x_{n}" for n in range(68)] + [f"y_{n}" for n in range(68)]
HEADER += [f"{unit}_r" for unit in UNITS] + ["AU28_c"]


def line(frame: int, success: int, confidence: float, units: dict[str, float]) -> str:
    points = [*(frame * 100 + n for n in range(68)), *(frame * 100 + n + 0.5 for n in range(68))]
    told = [units.get(unit, 0.0) for unit in UNITS]
    return ", ".join(map(str, [frame, 0.04 * frame, confidence, success, *points, *told, 1.0]))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of the clip train/fear/0007.mp4: three frames, the second without a face, the third of two faces."""
    path = tmp_path / "train" / "fear" / "0007.csv"
    path.parent.mkdir(parents=True)
    lines = [
        ", ".join(HEADER),
        line(1, 1, 0.98, {"AU01": 2.5, "AU26": 5.0}),
        line(2, 0, 0.03, {"AU01": 1.0}),
        line(3, 1, 0.4, {"AU12": 1.0}),
        line(3, 1, 0.9, {"AU12": 4.0}),
    ]
    path.write_text("\n".join(lines) + "\n")
    return tmp_path


def test_intensities_are_fifths_and_frames_count_from_one(folder: Path):
    reader = OpenFaceReader(Config(folder=folder))
    found = reader.stored("train/fear/0007.mp4", [0, 1, 2, 3])
    assert found is not None
    assert found.presence.tolist() == [0.98, 0.0, 0.9, 0.0]
    assert found.intensity[0, UNITS.index("AU01")] == 0.5
    assert found.intensity[0, UNITS.index("AU26")] == 1.0
    assert found.intensity[2, UNITS.index("AU12")] == 0.8
    assert not found.intensity[[1, 3]].any()
    assert found.mean_intensity[0] == pytest.approx(1.5 / 17)
    assert found.landmarks is not None
    assert found.landmarks[0, 5].tolist() == [105.0, 105.5]
    assert np.isnan(found.landmarks[1]).all()


def test_a_folder_of_frames_may_have_a_dot_in_its_name(folder: Path):
    (folder / "train/fear/0007.csv").rename(folder / "train/fear/take.2.csv")
    assert OpenFaceReader(Config(folder=folder)).stored("train/fear/take.2", [0]) is not None


def test_what_it_has_no_file_of_is_not_stored_and_cannot_be_read(folder: Path):
    reader = OpenFaceReader(Config(folder=folder))
    assert reader.stored("train/fear/0008", [0]) is None
    assert not reader.reads_pixels
    with pytest.raises(ConfigError, match="binary"):
        reader.read(np.zeros((1, 8, 8, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("frame, success\n1, 1\n", "no column AU01_r"),
        ("", "no column"),
        (None, "could not convert"),
        ("short", "damaged"),
    ],
)
def test_files_that_are_not_openfaces_are_named(folder: Path, text: str | None, told: str):
    path = folder / "train/fear/0007.csv"
    whole = path.read_text()
    path.write_text({None: whole.replace("0.98", "much"), "short": whole[:-60]}.get(text, text or ""))
    with pytest.raises(BadFile, match=told) as error:
        OpenFaceReader(Config(folder=folder)).stored("train/fear/0007", [0])
    assert str(path) in error.value.message


PROGRAM = f"""#!{sys.executable}
import sys
from pathlib import Path
from PIL import Image
given = dict(zip(sys.argv[1::2], sys.argv[2::2])) if len(sys.argv) % 2 else {{}}
place = Path(sys.argv[sys.argv.index("-fdir") + 1])
out = Path(sys.argv[sys.argv.index("-out_dir") + 1])
assert "-aus" in sys.argv and "-au_static" in sys.argv
out.mkdir()
lines = [{", ".join(HEADER)!r}]
for number, path in enumerate(sorted(place.iterdir()), 1):
    red = Image.open(path).getpixel((0, 0))[0]
    values = [number, 0, 0.9, 1] + [0] * 136 + [red / 51] * {len(UNITS)} + [0]
    lines.append(", ".join(map(str, values)))
(out / (sys.argv[sys.argv.index("-of") + 1] + ".csv")).write_text("\\n".join(lines))
"""


def program(folder: Path, text: str) -> Path:
    path = folder / "FeatureExtraction"
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_its_program_reads_new_frames_in_their_order(tmp_path: Path):
    reader = OpenFaceReader(Config(binary=program(tmp_path, PROGRAM)))
    frames = np.zeros((12, 4, 4, 3), dtype=np.uint8)
    frames[..., 0] = (np.arange(12) * 20)[:, None, None]
    found = reader.read(frames)
    np.testing.assert_allclose(found.intensity[:, 3], np.arange(12) * 20 / 255)
    assert found.presence.tolist() == [0.9] * 12


@pytest.mark.parametrize("how", ["FeatureExtraction", "./FeatureExtraction", "sub/FeatureExtraction", "on PATH"])
def test_its_program_may_be_named_in_any_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str):
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    program(tmp_path / "sub" if how in ("sub/FeatureExtraction", "on PATH") else tmp_path, PROGRAM)
    if how == "on PATH":
        monkeypatch.setenv("PATH", str(tmp_path / "sub"), prepend=":")
        how = "FeatureExtraction"
    reader = OpenFaceReader(Config.model_validate({"binary": how}))
    monkeypatch.chdir("/")
    assert reader.read(np.zeros((2, 4, 4, 3), dtype=np.uint8)).presence.tolist() == [0.9, 0.9]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("no program, but may be executed", "cannot be run"),
        ("#!/bin/sh\necho no model >&2\nexit 3\n", "status 3: no model"),
        ("#!/bin/sh\nexit 0\n", "wrote no CSV"),
        ("#!/bin/sh\nexec sleep 20\n", "took more than 0.2 s"),
    ],
)
def test_a_program_that_fails_is_told(tmp_path: Path, text: str, told: str):
    reader = OpenFaceReader(Config(binary=program(tmp_path, text), timeout_s=0.2 if "sleep" in text else 20))
    with pytest.raises(GenerationFailed, match=told):
        reader.read(np.zeros((1, 4, 4, 3), dtype=np.uint8))


@pytest.mark.parametrize("table", [{}, {"folder": "nowhere"}, {"binary": "nowhere"}, {"binary": "/"}])
def test_wrong_settings_are_refused(table: dict[str, str]):
    with pytest.raises(ConfigError):
        open_reader(FacesConfig.model_validate({"reader": "openface", "openface": table}))
