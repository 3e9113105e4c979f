"""py-feat's answer, of the form that versions 0.6 and 0.7 document: a stand-in gives it, py-feat itself is not here."""

from __future__ import annotations

import sys
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from generator_service.faces.interface import FacesConfig, open_reader
from generator_service.faces.pyfeat import UNITS
from protocol.errors import ConfigError, GenerationFailed


class Table(dict):
    """As much of a data frame as is asked of it."""

    def to_dict(self, orient: str) -> dict:
        assert orient == "list"
        return dict(self)


class Detector:
    """Of a picture whose red is r: a face of score r / 255 showing r / 255 of everything, and a fainter one showing
    all; of a black one a row of NaNs, as py-feat answers where it finds nobody."""

    def __init__(self, au_model: str, device: str):
        if au_model == "none":
            raise ValueError("unknown au_model")
        self.called = (au_model, device)

    def detect(self, inputs: list[str], data_type: str, batch_size: int, progress_bar: bool) -> Table:
        assert data_type == "image" and not progress_bar and batch_size == 8
        columns: dict[str, list] = {name: [] for name in ("input", "FaceScore", *UNITS)}
        columns |= {f"{axis}_{point}": [] for axis in "xy" for point in range(68)}
        for path in reversed(inputs):  # in any order
            red = Image.open(path).getpixel((0, 0))[0] / 255
            for score, shown in [(red, red), (red / 2, 1.0)] if red else [(np.nan, np.nan)]:
                columns["input"].append(path)
                columns["FaceScore"].append(score)
                for unit in UNITS:
                    columns[unit].append(shown)
                for name in columns.keys() - {"input", "FaceScore", *UNITS}:
                    columns[name].append(ord(name[0]) + int(name[2:]))
        return Table(columns)


@pytest.fixture
def feat(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("feat")
    module.Detector = Detector
    monkeypatch.setitem(sys.modules, "feat", module)
    return module


def test_the_surest_face_of_each_frame_is_read(feat: ModuleType):
    reader = open_reader(FacesConfig(reader="pyfeat"))
    frames = np.zeros((3, 4, 4, 3), dtype=np.uint8)
    frames[1, ..., 0], frames[2, ..., 0] = 51, 204
    found = reader.read(frames)
    np.testing.assert_allclose(found.presence, [0.0, 0.2, 0.8])
    np.testing.assert_allclose(found.intensity, np.array([[0.0], [0.2], [0.8]]).repeat(20, 1))
    assert found.landmarks is not None and np.isnan(found.landmarks[0]).all()
    assert found.landmarks[2, 3].tolist() == [ord("x") + 3, ord("y") + 3]
    assert reader.against(found, found[[0]]) is found


def test_an_answer_of_another_form_is_told(feat: ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Detector, "detect", lambda self, inputs, **options: Table(input=inputs))
    with pytest.raises(GenerationFailed, match="no column AU01"):
        open_reader(FacesConfig(reader="pyfeat")).read(np.zeros((1, 4, 4, 3), dtype=np.uint8))


def test_a_wrong_model_is_told(feat: ModuleType):
    with pytest.raises(ConfigError, match="unknown au_model"):
        open_reader(FacesConfig.model_validate({"reader": "pyfeat", "pyfeat": {"au_model": "none"}}))


def test_without_the_package_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "feat", None)
    with pytest.raises(ConfigError, match="install it, or use"):
        open_reader(FacesConfig(reader="pyfeat"))


def test_an_unknown_reader_is_told_with_those_that_there_are():
    with pytest.raises(ConfigError, match="landmarks, openface, pyfeat"):
        open_reader(FacesConfig(reader="haar"))
