"""What reads faces: which action units a frame shows, and how strongly; and the settings of choosing neutral frames.

No torch here: settings are parsed before it is imported. Knows no reader, nor what readings are used for.

    N frames, K action units, C clips
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from generator_service import registry
from generator_service.registry import FACE_READERS
from protocol import config as settings
from protocol.fields import Unit

POINTS = 68  # landmarks of a face, in the order of 300-W


class FacesConfig(BaseModel):
    """The table [generator.faces]: how faces are read, and which frames may begin a clip (ARGen eqs. 6, 22-26)."""

    model_config = ConfigDict(extra="forbid")

    reader: str = "landmarks"  # registry name; its own settings are [generator.faces.landmarks] and the like
    readers: dict[str, dict[str, Any]] = {}  # those tables; checked by the reader's Config when it is opened
    folder: Path = Path("runs/generator/faces")  # what was found of each clip, and action_units.json; replicas share it
    max_frames: int = Field(default=64, ge=1, le=4096)  # of a clip that are looked at, evenly spread

    min_presence: Unit = 0.5  # that a frame shows a face; 0: every frame does, 1: only what is certain
    min_sharpness: float = Field(default=50.0, ge=0.0)  # variance of the Laplacian (eq. 22); 0: any, 500: very crisp
    min_brightness: float = Field(default=40.0, ge=0.0, le=255.0)  # mean grey level (eq. 25); darker: left out
    max_brightness: float = Field(default=220.0, ge=0.0, le=255.0)  # brighter frames are left out
    min_contrast: float = Field(default=20.0, ge=0.0, le=128.0)  # standard deviation of the grey levels (eq. 26)
    min_side: int = Field(default=64, ge=1)  # pixels of a frame's shorter side

    unit_threshold: Unit = 0.3  # intensity from which an action unit counts as shown, in the statistics
    min_support: float = Field(default=0.1, gt=0.0, le=1.0)  # part of a class's clips that share a combination of them
    max_units: int = Field(default=5, ge=1, le=6)  # in a combination

    @model_validator(mode="before")
    @classmethod
    def _gather_reader_tables(cls, table: dict[str, Any]) -> dict[str, Any]:
        """[generator.faces.openface] is the table of reader "openface", for every name in the registry."""
        own = {name: value for name, value in table.items() if name in FACE_READERS}
        rest = {name: value for name, value in table.items() if name not in FACE_READERS}
        return rest | {"readers": rest.get("readers", {}) | own} if own else rest

    @model_validator(mode="after")
    def _some_brightness_is_allowed(self) -> FacesConfig:
        if self.min_brightness >= self.max_brightness:
            raise ValueError(f"min_brightness = {self.min_brightness:g} leaves nothing below max_brightness: lower it")
        return self


@dataclass(frozen=True)
class FaceReading:
    """What was read of N frames. There are no NaNs but in landmarks."""

    presence: np.ndarray  # float64 [N] in [0, 1]: that the frame shows a face
    units: tuple[str, ...]  # K codes, such as "AU04"
    intensity: np.ndarray  # float64 [N, K] in [0, 1], FACS levels A to E over their range; 0 where there is no face
    landmarks: np.ndarray | None = None  # float64 [N, 68, 2], x and y in pixels, NaN where there is no face; None: none

    def __post_init__(self) -> None:
        count = len(self.presence)
        assert self.intensity.shape == (count, len(self.units)), (self.intensity.shape, count, self.units)
        for values in (self.presence, self.intensity):
            assert np.all((values >= 0.0) & (values <= 1.0)), (values.min(), values.max())
        assert self.landmarks is None or self.landmarks.shape == (count, POINTS, 2)

    def __len__(self) -> int:
        return len(self.presence)

    def __getitem__(self, rows: Sequence[int] | slice | np.ndarray) -> FaceReading:
        """Of these frames."""
        landmarks = None if self.landmarks is None else self.landmarks[rows]
        return FaceReading(self.presence[rows], self.units, self.intensity[rows], landmarks)

    @property
    def mean_intensity(self) -> np.ndarray:
        """float64 [N], a(I) (ARGen eq. 23)."""
        return self.intensity.mean(axis=1)


class FaceReader(Protocol):
    """Reads faces. Used from one thread at a time."""

    units: tuple[str, ...]  # of its readings
    identity: str  # what its readings depend on: a model's digest, a folder; readings kept on disk are told apart by it
    reads_pixels: bool  # whether `read` works; else there is only what is `stored`

    def read(self, frames: np.ndarray, neutral: np.ndarray | None = None) -> FaceReading:
        """
        Args:
            frames: uint8 [N, H, W, 3]; each shows one face, which fills a good part of it.
            neutral: uint8 [C, H', W', 3], where C divides N: the neutral face of each N / C frames in a row, which
                intensity is counted from. Readers whose intensities are absolute make no use of it.

        Raises:
            ConfigError: it reads no pixels. GenerationFailed: the tool that it asks failed.
        """
        ...

    def against(self, reading: FaceReading, neutral: FaceReading) -> FaceReading:
        """A reading of N frames, counted from the neutral faces of C clips in a row, where C divides N."""
        ...

    def stored(self, clip: str, frames: Sequence[int]) -> FaceReading | None:
        """What was read beforehand of these frames of a clip, by its path in the dataset; None: nothing was.

        Raises:
            BadFile: what is stored cannot be read.
        """
        ...


class AbsoluteReader:
    """Base of readers whose intensities need no neutral face, and which store nothing."""

    def against(self, reading: FaceReading, neutral: FaceReading) -> FaceReading:
        """As it was."""
        return reading

    def stored(self, clip: str, frames: Sequence[int]) -> FaceReading | None:
        """None."""
        return None


def open_reader(config: FacesConfig) -> FaceReader:
    """The reader that the settings name. Raises ConfigError."""
    kind, reader_settings = registry.face_reader(config.reader)
    table = f"generator.faces.{config.reader}"
    return kind(settings.section({table: config.readers.get(config.reader, {})}, table, reader_settings))
