"""The dataset contract: a folder of labelled pictures, or of clips, that trainer and generator service read alike.

Two layouts, as in Hugging Face's imagefolder: class folders `root[/split]/<class>/<image>`, or
`root[/split]/metadata.jsonl` with `file_name` and `label` (a class name, or an int) and perhaps `caption` or `text`,
`camera` and `subject` on each line. With layout "clips" what is named so is a folder of frames, an animated picture or
a video file. Published sets are read as they come: of identities, see `dataset_identity`; of expressions in clips, see
`dataset_clips`. Knows nothing of models or tensors.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from protocol import codec
from protocol.clips import spread
from protocol.config import Settings, section
from protocol.dataset_files import BadFileReport, check_files, read_clip, read_picture, report
from protocol.dataset_layout import Layout, Listed, check_root, class_names, list_split, split_folder
from protocol.errors import BadFile, ConfigError, DatasetError, InvalidClip, InvalidImage, UnknownSource

SPLIT = r"^[^/\\.][^/\\]*$"  # pattern of a split's name: a sub-folder


class DatasetConfig(BaseModel):
    """Which pictures or clips to read."""

    model_config = ConfigDict(extra="forbid")

    root: Path  # folder with the classes, the splits or metadata.jsonl in it
    split: str | None = Field(default=None, pattern=SPLIT)  # sub-folder of root; None: root itself
    layout: Layout = "auto"  # auto: Market-1501, CUHK03-NP, DFEW, FERV39k and CK+ told by their folders, else
    # imagefolder, of clips where all are video files; clips: as imagefolder, of clips, each a file or folder of frames
    fold: int | None = Field(default=None, ge=1, le=5)  # of layout dfew, which needs one: 1 to 5
    on_bad_file: Literal["skip", "fail"] = "skip"  # a file that is no picture: leave it out and report it, or stop
    max_pixels: int = Field(default=codec.MAX_PIXELS, ge=1)  # width x height past which a file, or a frame, is bad
    classes: list[str] | None = Field(default=None, min_length=2)  # label -> name; None: found in the data, sorted
    max_classes: int | None = Field(default=None, ge=2)  # the first n by label; pictures of others are left out
    max_per_class: int | None = Field(default=None, ge=1)  # the first n by path of each class; None: all
    threads: int = Field(default=8, ge=1, le=256)  # that decode every picture and frame once at the start
    links_to: list[Path] = []  # folders outside root that symbolic links in it may lead to

    @classmethod
    def of_service(cls, settings: Settings) -> DatasetConfig:
        """The images that the generator service of these settings learns from: its own, or the trainer's.

        Raises:
            ConfigError: neither is named, or the table is wrong.
        """
        for table in ("generator", "trainer"):
            if "dataset" in settings.get(table, {}):
                return section({f"{table}.dataset": settings[table]["dataset"]}, f"{table}.dataset", cls)
        raise ConfigError(
            f"{settings.source} names no dataset: give the service's settings with --config, with a table "
            "[generator.dataset] or [trainer.dataset]",
            param="config",
        )

    def places(self) -> tuple[Path, ...]:
        """The folders that every picture is in, links resolved."""
        return tuple(path.resolve() for path in (self.root, *self.links_to))


@dataclass(frozen=True)
class Entry:
    """One labelled picture or clip."""

    id: str  # hash of `relative`: the same on every machine, whatever other files there are
    label: int  # index into the dataset's classes
    class_name: str
    caption: str | None  # None: the dataset has none
    path: Path
    relative: str  # to root, with the split, "/" between the parts
    camera: str | None = None  # or whatever stands for the view; None: not known
    subject: str | None = None  # whom it shows, where that is not the label; None: not known
    frames: int | None = None  # how many a clip has; None: it is a picture

    @property
    def is_clip(self) -> bool:
        return self.frames is not None


def sample_id(relative: str) -> str:
    """Id of the picture, or clip, at this path under root ("/" between the parts)."""
    return hashlib.sha256(relative.encode()).hexdigest()[:32]


class Dataset:
    """Labelled pictures, or labelled clips, in the order of their paths. Immutable; pixels are read when asked for."""

    def __init__(
        self,
        classes: Sequence[str],
        samples: Iterable[Entry],
        bad_files: Iterable[BadFileReport] = (),
        max_pixels: int = codec.MAX_PIXELS,
        places: Sequence[Path] | None = None,
    ):
        """Most callers want `open`. `places`: the only folders that pictures are read from; None: any."""
        self.classes = tuple(classes)  # label -> name; the same for every split
        self.samples = tuple(samples)
        self.bad_files = tuple(bad_files)
        self._max_pixels, self._places = max_pixels, places
        self._by_id = {entry.id: entry for entry in self.samples}

    @classmethod
    def open(cls, config: DatasetConfig) -> Dataset:
        """List the pictures or clips and decode each once, so that every bad file is known by name.

        Raises:
            BadFile: a file does not decode and `on_bad_file` is "fail".
            DatasetError: no root, no samples, fewer than two classes, an empty class, bad metadata. Says what to do.
        """
        check_root(config.root, config.split, config.layout, config.fold)
        listed = list_split(config.root, config.split, config.layout, config.fold)
        classes = tuple(config.classes or class_names(config.root, config.split, config.layout))[: config.max_classes]
        dataset = cls._decoded(config, _capped(listed, classes, config), classes)
        _check_balance(dataset.samples, classes, config)
        return dataset

    @classmethod
    def open_identities(cls, config: DatasetConfig) -> Dataset:
        """As `open`, for a split to search in, not to learn: its classes are the identities it shows, be it only one.

        `classes`, `max_classes` and `max_per_class` are about what is learnt, and say nothing here.
        """
        check_root(config.root, config.split, config.layout, config.fold)
        found = list_split(config.root, config.split, config.layout, config.fold)
        listed = [replace(item, label=str(item.label)) for item in found]
        dataset = cls._decoded(config, listed, tuple(sorted({str(item.label) for item in listed})))
        _check_any(dataset.samples, config)
        return dataset

    @classmethod
    def _decoded(cls, config: DatasetConfig, listed: Sequence[Listed], classes: tuple[str, ...]) -> Dataset:
        labels = {name: label for label, name in enumerate(classes)}
        entries = [_entry(config, item, classes, labels) for item in listed]
        checked = check_files([(entry.path, entry.is_clip) for entry in entries], config)
        bad = [found for found in checked if isinstance(found, BadFileReport)]
        report(bad, config.on_bad_file)
        good = [
            replace(entry, frames=found)
            for entry, found in zip(entries, checked, strict=True)
            if not isinstance(found, BadFileReport)
        ]
        return cls(classes, good, bad, config.max_pixels, config.places())

    def __len__(self) -> int:
        return len(self.samples)

    def __contains__(self, sample: str) -> bool:
        """Whether there is a sample with this id."""
        return sample in self._by_id

    def by_id(self, sample: str) -> Entry:
        """The sample with this id. Raises UnknownSource."""
        if sample not in self._by_id:
            raise UnknownSource(
                f"the dataset has no sample {sample!r}: mount the same dataset folder on both sides", param="sample_id"
            )
        return self._by_id[sample]

    def subset(self, indices: Iterable[int]) -> Dataset:
        """The samples at these indices, in that order, with the same classes."""
        samples = [self.samples[index] for index in indices]
        return Dataset(self.classes, samples, self.bad_files, self._max_pixels, self._places)

    def digest(self) -> str:
        """Hash of the classes and of every sample's id and label: which data these are, as far as names tell."""
        parts = [*self.classes, *(f"{entry.id}:{entry.label}" for entry in self.samples)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def is_clips(self) -> bool:
        """Whether the samples are clips; all are of one kind."""
        return any(entry.is_clip for entry in self.samples)

    def entry(self, sample: int | str) -> Entry:
        """The sample with this index or id. Raises UnknownSource."""
        return self.by_id(sample) if isinstance(sample, str) else self.samples[sample]

    def image(self, sample: int | str, frame: int | None = None) -> np.ndarray:
        """Decode one picture, by index or id; of a clip its frame with this number from 0, by default the first.

        Returns:
            uint8 RGB [H, W, 3].

        Raises:
            BadFile: the file changed since the dataset was opened and cannot be read any more.
            InvalidClip: there is no such frame.
        """
        entry = self.entry(sample)
        if entry.is_clip:
            return self.clip(sample, [frame or 0])[0]
        _check_frames(entry, [frame or 0], 1)
        return self._read(entry, lambda: read_picture(entry.path, self._max_pixels, self._places))

    def clip(self, sample: int | str, frames: int | Sequence[int] | None = None) -> np.ndarray:
        """Decode a clip, by index or id.

        Args:
            frames: so many, evenly spread, with repeats where it has fewer (`clips.spread`); or these, by number from
                0; None: all.

        Returns:
            uint8 RGB [M, H, W, 3].

        Raises:
            BadFile: as `image`.
            InvalidClip: there is no such frame, or the sample is a picture.
        """
        entry = self.entry(sample)
        if entry.frames is None:
            raise InvalidClip(f'{entry.path} is a picture: set layout = "clips" for a dataset of clips')
        if frames is None:
            frames = range(entry.frames)
        wanted = spread(entry.frames, frames) if isinstance(frames, int) else list(frames)
        _check_frames(entry, wanted, entry.frames)
        return self._read(entry, lambda: read_clip(entry.path, wanted, self._max_pixels, self._places))

    def _read(self, entry: Entry, read: Callable[[], np.ndarray]) -> np.ndarray:
        try:
            return read()
        except (OSError, InvalidImage, InvalidClip) as error:
            raise BadFile(f"{entry.path} cannot be read any more ({error}): restore it and start again") from error


def _capped(listed: Sequence[Listed], classes: tuple[str, ...], config: DatasetConfig) -> list[Listed]:
    """What `max_classes` and `max_per_class` leave."""
    known, seen, kept = set(classes), Counter[int | str](), []
    for item in listed:
        within = item.label < len(classes) if isinstance(item.label, int) else item.label in known
        if config.max_classes is not None and not within:
            continue
        seen[item.label] += 1
        if config.max_per_class is None or seen[item.label] <= config.max_per_class:
            kept.append(item)
    return kept


def _entry(config: DatasetConfig, item: Listed, classes: tuple[str, ...], labels: Mapping[str, int]) -> Entry:
    label = item.label if isinstance(item.label, int) else labels.get(item.label, -1)
    if not 0 <= label < len(classes):
        raise DatasetError(
            f"{item.where}: label {item.label!r} is outside the {len(classes)} classes ({', '.join(classes[:20])}): "
            "correct it, or add the class to `classes`"
        )
    path = config.root / item.on_disk
    frames = 0 if item.is_clip else None  # counted when it is decoded
    return Entry(
        sample_id(item.relative),
        label,
        classes[label],
        item.caption,
        path,
        item.relative,
        item.camera,
        item.subject,
        frames,
    )


def _check_frames(entry: Entry, wanted: Sequence[int], there: int) -> None:
    if outside := [frame for frame in wanted if not 0 <= frame < there]:
        raise InvalidClip(f"{entry.path} has no frame {outside[0]}: it has {there}, counted from 0")


def _check_balance(entries: Sequence[Entry], classes: tuple[str, ...], config: DatasetConfig) -> None:
    """At least two classes, each with a sample."""
    place = _check_any(entries, config)
    if len(classes) < 2:
        raise DatasetError(f"{place} has one class only ({classes[0]}): a classifier needs two at least")
    counts = Counter(entry.label for entry in entries)
    empty = [name for label, name in enumerate(classes) if not counts[label]]
    if empty:
        kind = "clips" if entries[0].is_clip else "images"
        raise DatasetError(
            f"{place} has no {kind} of class {', '.join(map(repr, empty[:20]))}: add some, or remove the class"
        )


def _check_any(entries: Sequence[Entry], config: DatasetConfig) -> Path:
    """At least one sample. Returns where they are."""
    place = split_folder(config.root, config.split, config.layout)
    if not entries:
        raise DatasetError(f"{place} has no images or clips: put them in class folders, or list them in metadata.jsonl")
    return place
