"""What a dataset's clips show: of each its neutral frame, or why it has none, and its apex (ARGen eqs. 6, 22-26).

What is found is kept in a file of a line a clip, so that it is found once: an interrupted examination goes on, and
replicas may share the file. Clips that could not be read are looked at again the next time. The file is named after the
dataset's labels and paths, the settings and the reader: delete it when clips change under the same names.

    M frames of a clip that are looked at, K action units
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from generator_service import json_lines
from generator_service.faces.gates import Quality, quality
from generator_service.faces.interface import FaceReader, FaceReading, FacesConfig
from protocol.clips import spread
from protocol.dataset import Dataset, Entry
from protocol.errors import BadFile

log = logging.getLogger(__name__)

Reason = Literal["small", "blurred", "dark", "bright", "low_contrast", "no_face", "undecodable", "unread"]
PASSING: tuple[Reason, ...] = ("undecodable", "unread")  # that may be otherwise the next time
AHEAD = 4  # clips that are decoded while one is read
SAVE_S = 5.0  # at most so much work is lost when the process is killed
NOT_SETTINGS = {"folder", "unit_threshold", "min_support", "max_units"}  # that change nothing of what is found


class Neutral(BaseModel):
    """The frame of a clip that begins others."""

    model_config = ConfigDict(frozen=True)

    frame: int
    intensity: float  # mean over the action units (eq. 23)
    sharpness: float  # eq. 22


class Examined(BaseModel):
    """What is known of one clip."""

    model_config = ConfigDict(frozen=True)

    clip: str  # sample id
    neutral: Neutral | None  # None: no frame passes
    left_out: Reason | None  # what most of the frames fail by, where none passes
    apex: int | None = None  # the frame of the highest mean intensity; None: no frame shows a face
    units: dict[str, float] = {}  # intensity of each action unit there, those of 0 left out


def examine(
    dataset: Dataset,
    config: FacesConfig,
    reader: FaceReader,
    folder: Path,
    on_clip: Callable[[int, int], None] = lambda done, total: None,
) -> list[Examined]:
    """Every clip of the dataset, in its order.

    Args:
        folder: of the file; made when missing.
        on_clip: called with the clips done, and the clips in all.

    Raises:
        ConfigError, GenerationFailed: as `FaceReader.read`. DiskFull: what was found before is kept.
    """
    path = folder / f"clips-{_digest(dataset, config, reader)}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    found = _read(path)
    todo = [entry for entry in dataset.samples if entry.id not in found]
    if todo:
        log.info("reading the faces of %d clips, %d are known", len(todo), len(dataset) - len(todo))
    done, unsaved, saved = len(dataset) - len(todo), list[Examined](), time.monotonic()
    on_clip(done, len(dataset))
    try:
        for entry, frames, pixels in _decoded(dataset, todo, config.max_frames):
            one = examined(entry, frames, pixels, config, reader)
            found[entry.id] = one
            if one.left_out not in PASSING:
                unsaved.append(one)
            done += 1
            on_clip(done, len(dataset))
            if time.monotonic() - saved >= SAVE_S:
                _append(path, unsaved)
                unsaved, saved = [], time.monotonic()
                log.info("%d of %d clips are read", done, len(dataset))
    finally:
        _append(path, unsaved)
    return [found[entry.id] for entry in dataset.samples]


def examined(
    entry: Entry, frames: Sequence[int], pixels: np.ndarray | None, config: FacesConfig, reader: FaceReader
) -> Examined:
    """One clip.

    Args:
        frames: numbers of the frames that are looked at. pixels: uint8 [M, H, W, 3] of them; None: not decodable.
    """
    if pixels is None:
        return Examined(clip=entry.id, neutral=None, left_out="undecodable")
    reading = _reading(entry, frames, pixels, reader)
    if reading is None:
        return Examined(clip=entry.id, neutral=None, left_out="unread")
    measured = quality(pixels)
    fails = failing(measured, reading.presence, config)
    usable = np.flatnonzero([reason is None for reason in fails])
    neutral = left_out = None
    if len(usable):
        best = int(usable[np.argmin(reading.mean_intensity[usable])])
        neutral = Neutral(
            frame=frames[best],
            intensity=round(float(reading.mean_intensity[best]), 6),
            sharpness=round(float(measured.sharpness[best]), 3),
        )
        reading = reader.against(reading, reading[[best]])
    else:
        left_out = Counter(fails).most_common(1)[0][0]
    faces = np.flatnonzero(reading.presence >= config.min_presence)
    if not len(faces):
        return Examined(clip=entry.id, neutral=neutral, left_out=left_out)
    apex = int(faces[np.argmax(reading.mean_intensity[faces])])
    shown = {unit: round(float(value), 4) for unit, value in zip(reading.units, reading.intensity[apex], strict=True)}
    units = {unit: value for unit, value in shown.items() if value > 0}
    return Examined(clip=entry.id, neutral=neutral, left_out=left_out, apex=frames[apex], units=units)


def failing(measured: Quality, presence: np.ndarray, config: FacesConfig) -> list[Reason | None]:
    """The first gate that each frame fails; None: it passes all."""
    gates: tuple[tuple[Reason, np.ndarray | bool], ...] = (
        ("small", measured.side < config.min_side),
        ("dark", measured.brightness < config.min_brightness),
        ("bright", measured.brightness > config.max_brightness),
        ("no_face", presence < config.min_presence),
        ("low_contrast", measured.contrast < config.min_contrast),
        ("blurred", measured.sharpness < config.min_sharpness),
    )
    failed = [np.broadcast_to(fails, presence.shape) for _, fails in gates]
    return [next((gates[at][0] for at, fails in enumerate(failed) if fails[row]), None) for row in range(len(presence))]


def _reading(entry: Entry, frames: Sequence[int], pixels: np.ndarray, reader: FaceReader) -> FaceReading | None:
    try:
        stored = reader.stored(entry.relative, frames)
    except BadFile as error:
        log.warning("%s", error.message)
        return None
    if stored is not None:
        return stored
    return reader.read(pixels) if reader.reads_pixels else None


def _decoded(
    dataset: Dataset, entries: Sequence[Entry], limit: int
) -> Iterator[tuple[Entry, list[int], np.ndarray | None]]:
    """Each clip with the numbers of the frames to look at, and those frames; the next ones are decoded meanwhile."""

    def decode(entry: Entry) -> tuple[Entry, list[int], np.ndarray | None]:
        assert entry.frames is not None
        frames = list(range(entry.frames)) if entry.frames <= limit else spread(entry.frames, limit)
        try:
            return entry, frames, dataset.clip(entry.id, frames)
        except BadFile as error:
            log.warning("%s", error.message)
            return entry, frames, None

    with ThreadPoolExecutor(AHEAD) as pool:
        waiting: deque[Future[tuple[Entry, list[int], np.ndarray | None]]] = deque()
        try:
            for entry in entries:
                waiting.append(pool.submit(decode, entry))
                if len(waiting) > AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


# ---------------------------------------------------------------- the file


def _digest(dataset: Dataset, config: FacesConfig, reader: FaceReader) -> str:
    settings = config.model_dump_json(exclude={*NOT_SETTINGS, "readers"})
    return hashlib.sha256(f"{dataset.digest()}\n{settings}\n{reader.identity}".encode()).hexdigest()[:32]


def _read(path: Path) -> dict[str, Examined]:
    """By clip; a line of another form is left out."""
    found = {}
    for line in json_lines.read(path):
        try:
            one = Examined.model_validate(line)
        except ValidationError:
            continue
        found[one.clip] = one
    return found


def _append(path: Path, lines: Sequence[Examined]) -> None:
    json_lines.append(path, [one.model_dump(mode="json") for one in lines])
