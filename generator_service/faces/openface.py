"""Action units by OpenFace 2: from the CSV files that it wrote of a dataset's clips, and by asking it about new frames.

The files lie in a folder that mirrors the dataset: of the clip "train/fear/0007" or "train/fear/0007.mp4" it is
"train/fear/0007.csv", as `FeatureExtraction -out_dir` names it. Columns are found by name; intensities (AU01_r, ...)
are from 0 to 5, and frames count from 1.
"""

from __future__ import annotations

import csv
import math
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from generator_service.faces.interface import POINTS, AbsoluteReader, FaceReading
from protocol.errors import BadFile, ConfigError, GenerationFailed

UNITS = tuple(
    f"AU{number:02}" for number in (1, 2, 4, 5, 6, 7, 9, 10, 12, 14, 15, 17, 20, 23, 25, 26, 45)
)  # whose intensity it tells
GREATEST = 5.0  # intensity
TOLD = 500  # characters of what it says when it fails


class Config(BaseModel):
    """Where OpenFace's output is, and where it is itself. One of both is needed."""

    model_config = ConfigDict(extra="forbid")

    folder: Path | None = None  # of the CSV files; None: there are none
    binary: Path | None = None  # OpenFace's program FeatureExtraction, a path or a name on PATH; None: frames that have
    # no CSV are not read
    timeout_s: float = Field(default=600.0, gt=0.0)  # that it may take for the frames of one call


class OpenFaceReader(AbsoluteReader):
    """Reads what OpenFace found, or finds when it is asked."""

    units = UNITS

    def __init__(self, config: Config):
        """Raises ConfigError when there is nothing to read from."""
        if config.folder is None and config.binary is None:
            raise ConfigError("OpenFace needs `folder`, of its CSV files, or `binary`, its program FeatureExtraction")
        if config.folder is not None and not config.folder.is_dir():
            raise ConfigError(f"there is no folder {config.folder} with OpenFace's CSV files: check `folder`")
        self._config, self._program = config, None if config.binary is None else _program(config.binary)
        self.identity = f"openface {config.folder} {self._program}"
        self.reads_pixels = self._program is not None

    def stored(self, clip: str, frames: Sequence[int]) -> FaceReading | None:
        """From the clip's CSV file; frames that it lacks show no face.

        Raises:
            BadFile: the file is not OpenFace's.
        """
        if self._config.folder is None:
            return None
        names = (f"{clip}.csv", PurePosixPath(clip).with_suffix(".csv"))  # of a folder of frames, and of a file
        path = next((path for name in names if (path := self._config.folder / name).is_file()), None)
        return None if path is None else parsed(path, frames)

    def read(self, frames: np.ndarray, neutral: np.ndarray | None = None) -> FaceReading:
        """By OpenFace's static models, which look at each frame alone: those of several clips may follow each other.

        Raises:
            ConfigError: its program is not configured. GenerationFailed: it failed, or took too long.
        """
        if self._program is None:
            raise ConfigError(
                "OpenFace has no CSV file of these frames: name its program FeatureExtraction with "
                "generator.faces.openface.binary, or use another generator.faces.reader",
                param="generator.faces.openface.binary",
            )
        with tempfile.TemporaryDirectory() as place:
            pictures, out = Path(place) / "frames", Path(place) / "out"
            pictures.mkdir()
            for number, frame in enumerate(frames):
                Image.fromarray(frame).save(pictures / f"{number:06d}.png")
            self._run(["-fdir", str(pictures), "-out_dir", str(out), "-of", "read", "-2Dfp", "-aus", "-au_static"])
            if not (out / "read.csv").exists():
                raise GenerationFailed(f"{self._program} wrote no CSV file: try it by hand on a folder of frames")
            return parsed(out / "read.csv", range(len(frames)))

    def _run(self, arguments: list[str]) -> None:
        command = [str(self._program), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=self._config.timeout_s)
        except subprocess.TimeoutExpired as error:
            raise GenerationFailed(
                f"{command[0]} took more than {self._config.timeout_s:g} s: raise generator.faces.openface.timeout_s"
            ) from error
        except OSError as error:
            raise GenerationFailed(f"{command[0]} cannot be run ({error}): try it by hand") from error
        if done.returncode:
            told = (done.stderr or done.stdout).strip()[-TOLD:]
            raise GenerationFailed(f"{command[0]} failed with status {done.returncode}: {told}")


def _program(binary: Path) -> Path:
    """Where it is: on PATH, or else a path from the working folder. Raises ConfigError."""
    found = shutil.which(binary) or shutil.which(binary.absolute())
    if found is None:
        raise ConfigError(
            f"{binary} is no program that can be run: give the path of OpenFace's FeatureExtraction, or a name on "
            "PATH, as `binary`"
        )
    return Path(found).absolute()


def parsed(path: Path, frames: Sequence[int]) -> FaceReading:
    """OpenFace's CSV file, of these frames, counted from 0. Raises BadFile."""
    rows = _rows(path)
    presence, intensity = np.zeros(len(frames)), np.zeros((len(frames), len(UNITS)))
    landmarks = np.full((len(frames), POINTS, 2), np.nan)
    for at, frame in enumerate(frames):
        row = rows.get(frame + 1)
        if row is None or row["success"] == 0:
            continue
        presence[at] = np.clip(row["confidence"], 0.0, 1.0)
        intensity[at] = [np.clip(row[f"{unit}_r"] / GREATEST, 0.0, 1.0) for unit in UNITS]
        landmarks[at] = [(row.get(f"x_{point}", np.nan), row.get(f"y_{point}", np.nan)) for point in range(POINTS)]
    return FaceReading(presence, UNITS, intensity, landmarks)


def _rows(path: Path) -> dict[int, dict[str, float]]:
    """By frame number. Where several faces were found, the most certain of a frame."""
    found: dict[int, dict[str, float]] = {}
    wanted = {"frame", "success", "confidence"} | {f"{unit}_r" for unit in UNITS}
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            if missing := wanted - set(reader.fieldnames or ()):
                raise BadFile(
                    f"{path} is not of OpenFace's FeatureExtraction with -aus: it has no column {min(missing)}; write "
                    "it anew, or remove it"
                )
            for line in reader:
                row = {name: float(line[name]) for name in line if name in wanted or name[:2] in ("x_", "y_")}
                if not all(math.isfinite(row[name]) for name in wanted):
                    raise ValueError(f"line {reader.line_num} has values that are not finite")
                number = int(row["frame"])
                if number not in found or row["confidence"] > found[number]["confidence"]:
                    found[number] = row
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise BadFile(f"{path} is damaged ({error}): let OpenFace write it anew, or remove it") from error
    return found
