"""Files of a dataset, decoded: a picture or a clip that lies within its folders; and those that cannot be.

Knows nothing of labels, nor of how a dataset is laid out.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from protocol import clips, codec
from protocol.errors import BadFile, InvalidClip, InvalidImage

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BadFileReport:
    path: Path
    reason: str


class Bounds(Protocol):
    """What may be read, and how: see `DatasetConfig`."""

    max_pixels: int
    threads: int

    def places(self) -> tuple[Path, ...]: ...


def check_files(files: Sequence[tuple[Path, bool]], bounds: Bounds) -> list[int | BadFileReport | None]:
    """Decode each file once, in threads.

    Args:
        files: where each lies, and whether it is a clip.

    Returns:
        For each, in order: how many frames the clip has; None for a picture; or why it is bad: not decodable, too
        large, or led out of the dataset by a link.
    """
    with ThreadPoolExecutor(bounds.threads) as pool:
        return list(pool.map(partial(_checked, max_pixels=bounds.max_pixels, places=bounds.places()), files))


def report(bad: Sequence[BadFileReport], on_bad_file: str) -> None:
    """Tell of bad files, or raise BadFile when `on_bad_file` is "fail"."""
    if bad and on_bad_file == "fail":
        more = f" (and {len(bad) - 1} more bad files)" if len(bad) > 1 else ""
        raise BadFile(f'{bad[0].path}: {bad[0].reason}{more}. Repair or remove it, or set on_bad_file = "skip"')
    for one in bad:
        log.warning("skipped %s: %s", one.path, one.reason)


def read_picture(path: Path, max_pixels: int, places: Sequence[Path] | None) -> np.ndarray:
    """uint8 RGB [H, W, 3] of a picture within these folders; None: anywhere. Raises OSError, InvalidImage."""
    return codec.image_from_bytes(_within(path, places).read_bytes(), max_pixels=max_pixels)


def read_clip(path: Path, frames: Sequence[int], max_pixels: int, places: Sequence[Path] | None) -> np.ndarray:
    """uint8 RGB [M, H, W, 3] of these frames of a clip within these folders; None: anywhere. Raises InvalidImage,
    InvalidClip."""
    _check_within(path, places)
    return clips.read(path, frames, max_pixels=max_pixels)


def _checked(file: tuple[Path, bool], max_pixels: int, places: Sequence[Path]) -> int | BadFileReport | None:
    path, is_clip = file
    if not is_clip and clips.is_moving(path):
        return BadFileReport(path, 'it is a clip, and no picture: set layout = "clips" for a dataset of clips')
    try:
        if is_clip:
            _check_within(path, places)
            return clips.check(path, max_pixels=max_pixels)
        read_picture(path, max_pixels, places)
    except (InvalidImage, InvalidClip) as error:
        return BadFileReport(path, error.message.removeprefix(f"{path} "))
    except OSError as error:
        return BadFileReport(path, f"cannot be read: {error.strerror}")
    return None


def _check_within(path: Path, places: Sequence[Path] | None) -> None:
    """Of a clip: its file, or its folder with every frame."""
    for part in [path, *(clips.frame_files(path) if path.is_dir() else ())]:
        _within(part, places)


def _within(path: Path, places: Sequence[Path] | None) -> Path:
    real = path.resolve()
    if places is not None and not any(real.is_relative_to(place) for place in places):
        raise InvalidImage(f"it leads out of the dataset, to {real}: copy the file, or name its folder in `links_to`")
    return real
