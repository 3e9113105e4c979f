"""Action units by py-feat, where it is installed (`pip install py-feat`): a detector of faces, landmarks and units.

It comes with a large tree of packages and fetches its models when it is first used, so nothing here needs it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from generator_service.faces.interface import POINTS, AbsoluteReader, FaceReading
from protocol.errors import ConfigError, GenerationFailed

UNITS = tuple(f"AU{number:02}" for number in (1, 2, 4, 5, 6, 7, 9, 10, 11, 12, 14, 15, 17, 20, 23, 24, 25, 26, 28, 43))


class Config(BaseModel):
    """How py-feat's Detector is made."""

    model_config = ConfigDict(extra="forbid")

    au_model: str = "xgb"  # its name of a model of action units: xgb tells probabilities, svm only yes and no
    device: str = "cpu"  # as py-feat takes it: cpu, cuda, mps, auto
    batch_size: int = Field(default=8, ge=1, le=1024)  # frames in a forward pass


class PyFeatReader(AbsoluteReader):
    """Reads frames with py-feat; of several faces in one, the most certain."""

    units = UNITS
    reads_pixels = True

    def __init__(self, config: Config):
        """Raises ConfigError when py-feat is not installed, or has no such model."""
        try:
            from feat import Detector
        except ImportError as error:
            raise ConfigError(
                f'generator.faces.reader = "pyfeat" needs the package py-feat ({error}): install it, or use '
                '"landmarks" or "openface"',
                param="generator.faces.reader",
            ) from error
        try:
            self._detector = Detector(au_model=config.au_model, device=config.device)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ConfigError(f"py-feat cannot be used ({error}): check [generator.faces.pyfeat]") from error
        self._batch_size = config.batch_size
        self.identity = f"pyfeat {config.au_model}"

    def read(self, frames: np.ndarray, neutral: np.ndarray | None = None) -> FaceReading:
        """Frames go to py-feat as files, the way in that it documents.

        Raises:
            GenerationFailed: it answers in another form than is known here.
        """
        with tempfile.TemporaryDirectory() as place:
            paths = [str(Path(place) / f"{number:06d}.png") for number in range(len(frames))]
            for path, frame in zip(paths, frames, strict=True):
                Image.fromarray(frame).save(path)
            found = self._detector.detect(
                paths, data_type="image", batch_size=self._batch_size, progress_bar=False
            ).to_dict("list")
        needed = {"input", "FaceScore", *UNITS} | {f"{axis}_{point}" for axis in "xy" for point in range(POINTS)}
        if missing := needed - found.keys():
            raise GenerationFailed(
                f"py-feat's answer has no column {min(missing)}: use a version that has it (0.6, 0.7 do)"
            )
        return _reading(found, {path: number for number, path in enumerate(paths)})


def _reading(found: dict[str, list[Any]], numbers: dict[str, int]) -> FaceReading:
    """Of py-feat's table of faces, by the number of each picture."""
    presence, intensity = np.zeros(len(numbers)), np.zeros((len(numbers), len(UNITS)))
    landmarks = np.full((len(numbers), POINTS, 2), np.nan)
    for row, path in enumerate(found["input"]):
        at, score = numbers[str(path)], float(found["FaceScore"][row])
        shown = [float(found[unit][row]) for unit in UNITS]
        if not np.isfinite([score, *shown]).all() or score <= presence[at]:
            continue  # no face there, which py-feat tells by NaN, or a less certain one
        presence[at], intensity[at] = min(score, 1.0), np.clip(shown, 0.0, 1.0)
        landmarks[at] = [[float(found[f"{axis}_{point}"][row]) for axis in "xy"] for point in range(POINTS)]
    return FaceReading(presence, UNITS, intensity, landmarks)
