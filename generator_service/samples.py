"""The samples this replica made: provenance of all, pixels of those made for REST requests; both bounded.

    {root}/samples.jsonl, samples.1.jsonl   provenance, one line each; the older file goes when the newer one is full
    {root}/images/{id}.{png,jpeg,webp}      least recently used go first, of images and clips together
    {root}/clips/{id}.{webp,gif,mp4}

Does not know how images and clips are encoded.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from pydantic import ValidationError

from protocol import clips
from protocol.disk import full_disk_told
from protocol.entries import Sample
from protocol.errors import ConfigError, UnknownSample

log = logging.getLogger(__name__)

CURRENT, OLDER = "samples.jsonl", "samples.1.jsonl"
IMAGES, CLIPS = "images", "clips"
FORMATS = {IMAGES: ("png", "jpeg", "webp"), CLIPS: clips.FORMATS}
ADVICE = "free some, or lower generator.max_samples and generator.max_image_bytes"


@contextmanager
def held(root: Path) -> Iterator[None]:
    """Keep other processes out of a store's folder while the block runs; one that dies lets go of it.

    Raises:
        ConfigError: another replica has it.
    """
    root.mkdir(parents=True, exist_ok=True)
    with (root / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"another replica keeps its samples in {root}: give each its own generator.samples_dir",
                param="generator.samples_dir",
            ) from error
        yield


class SampleStore:
    """Samples by id. Thread-safe; what a previous process stored is found again."""

    def __init__(self, root: Path, max_samples: int, max_image_bytes: int):
        """
        Args:
            max_samples: provenance entries kept, at least half of it and at most this many.
            max_image_bytes: total size of the stored images and clips.
        """
        self._lock = threading.Lock()
        self._root = root
        self._segment_size = max(1, max_samples // 2)
        self._max_image_bytes = max_image_bytes
        self._older = self._index(OLDER)
        self._current = self._index(CURRENT)
        for kind in FORMATS:
            (root / kind).mkdir(parents=True, exist_ok=True)
        stored = sorted(
            (path for kind in FORMATS for path in (root / kind).iterdir()), key=lambda path: path.stat().st_mtime
        )
        self._sizes: OrderedDict[str, int] = OrderedDict(
            (f"{path.parent.name}/{path.name}", path.stat().st_size) for path in stored
        )
        self._image_bytes = sum(self._sizes.values())

    def add(self, samples: Iterable[Sample]) -> None:
        """Record provenance; a sample made again (a retried work unit) replaces its entry.

        Raises:
            DiskFull: none is recorded.
        """
        with self._lock:
            path = self._root / CURRENT
            with full_disk_told(path, ADVICE), path.open("ab", buffering=0) as file:
                end, lines, places = file.tell(), b"", {}
                for sample in samples:
                    places[sample.id] = end + len(lines)
                    lines += sample.model_dump_json().encode() + b"\n"
                _append(file, lines)
            self._current |= places
            if len(self._current) >= self._segment_size:
                os.replace(self._root / CURRENT, self._root / OLDER)
                self._older, self._current = self._current, {}

    def add_image(self, sample_id: str, data: bytes, image_format: str) -> None:
        """Store the encoded pixels of a sample; `image_format` is png, jpeg or webp. Raises DiskFull."""
        self._keep(f"{IMAGES}/{sample_id}.{image_format}", data)

    def add_clip(self, sample_id: str, data: bytes, clip_format: str) -> None:
        """Store the file of a clip; `clip_format` is webp, gif or mp4. Raises DiskFull."""
        self._keep(f"{CLIPS}/{sample_id}.{clip_format}", data)

    def _keep(self, name: str, data: bytes) -> None:
        """`name`: of the file, below the store's folder."""
        path = self._root / name
        with full_disk_told(path, ADVICE):
            try:
                path.write_bytes(data)
            except OSError:
                path.unlink(missing_ok=True)
                raise
        with self._lock:
            self._image_bytes += len(data) - self._sizes.pop(name, 0)
            self._sizes[name] = len(data)
            while self._image_bytes > self._max_image_bytes and len(self._sizes) > 1:
                oldest, size = self._sizes.popitem(last=False)
                self._image_bytes -= size
                (self._root / oldest).unlink(missing_ok=True)

    def get(self, sample_id: str) -> Sample:
        """Provenance of a sample. Raises UnknownSample."""
        with self._lock:
            for index, name in ((self._current, CURRENT), (self._older, OLDER)):
                if sample_id in index:
                    with (self._root / name).open("rb") as file:
                        file.seek(index[sample_id])
                        return Sample.model_validate_json(file.readline())
        raise UnknownSample(f"no sample {sample_id!r} here: another replica made it, or it was too long ago")

    def image(self, sample_id: str) -> tuple[bytes, str]:
        """(encoded bytes, media type). Raises UnknownSample when the pixels are not kept here, or are a clip."""
        return self._kept(IMAGES, sample_id)

    def clip(self, sample_id: str) -> tuple[bytes, str]:
        """(the file, media type). Raises UnknownSample when it is not kept here, or is an image."""
        return self._kept(CLIPS, sample_id)

    def _kept(self, kind: str, sample_id: str) -> tuple[bytes, str]:
        with self._lock:
            for form in FORMATS[kind]:
                name = f"{kind}/{sample_id}.{form}"
                if name in self._sizes:
                    self._sizes.move_to_end(name)
                    return (self._root / name).read_bytes(), f"{'video' if form == 'mp4' else 'image'}/{form}"
        raise UnknownSample(
            f"no {kind} of sample {sample_id!r} here: only those made for REST requests are kept, the least recently "
            "used go first"
        )

    def _index(self, name: str) -> dict[str, int]:
        """Sample id -> offset of its line. A last line that a crash cut short is removed."""
        path, index, offset = self._root / name, {}, 0
        if not path.exists():
            return index
        with path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    try:
                        index[Sample.model_validate_json(line).id] = offset
                    except ValidationError:
                        log.warning("%s has a damaged line at byte %d, which is left out", path, offset)
                    offset += len(line)
        os.truncate(path, offset)
        return index


def _append(file: FileIO, data: bytes) -> None:
    """Whole or not at all."""
    end, written = file.tell(), 0
    try:
        while written < len(data):
            written += file.write(data[written:])
    except OSError:
        if written:
            file.truncate(end)
        raise
