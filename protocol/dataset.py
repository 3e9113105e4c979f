"""The dataset contract: a folder of labelled pictures that trainer and generator service read alike.

Two layouts, as in Hugging Face's imagefolder: class folders `root[/split]/<class>/<image>`, or
`root[/split]/metadata.jsonl` with `file_name` and `label` (a class name, or an int) and perhaps `caption` or `text` and
`camera` on each line. Published sets of identities, a class each, are read as they come: see `dataset_identity`. Knows
nothing of models or tensors.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from protocol import codec
from protocol.config import Settings, section
from protocol.dataset_layout import Layout, Listed, check_root, class_names, list_split, split_folder
from protocol.errors import BadFile, ConfigError, DatasetError, InvalidImage, UnknownSource

log = logging.getLogger(__name__)


class DatasetConfig(BaseModel):
    """Which pictures to read."""

    model_config = ConfigDict(extra="forbid")

    root: Path  # folder with the classes, the splits or metadata.jsonl in it
    split: str | None = Field(default=None, pattern=r"^[^/\\.][^/\\]*$")  # sub-folder of root; None: root itself
    layout: Layout = "auto"  # auto: Market-1501 and CUHK03-NP told by their folders, else imagefolder
    on_bad_file: Literal["skip", "fail"] = "skip"  # a file that is no picture: leave it out and report it, or stop
    max_pixels: int = Field(default=codec.MAX_PIXELS, ge=1)  # width x height past which a file counts as bad
    classes: list[str] | None = Field(default=None, min_length=2)  # label -> name; None: found in the data, sorted
    max_classes: int | None = Field(default=None, ge=2)  # the first n by label; pictures of others are left out
    max_per_class: int | None = Field(default=None, ge=1)  # the first n by path of each class; None: all
    threads: int = Field(default=8, ge=1, le=256)  # that decode every picture once at the start
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
    """One labelled picture."""

    id: str  # hash of `relative`: the same on every machine, whatever other files there are
    label: int  # index into the dataset's classes
    class_name: str
    caption: str | None  # None: the dataset has none
    path: Path
    relative: str  # to root, with the split, "/" between the parts
    camera: str | None = None  # or whatever stands for the view; None: not known


@dataclass(frozen=True)
class BadFileReport:
    path: Path
    reason: str


def sample_id(relative: str) -> str:
    """Id of the picture at this path under root ("/" between the parts)."""
    return hashlib.sha256(relative.encode()).hexdigest()[:32]


class Dataset:
    """Labelled pictures in the order of their paths. Immutable; pictures are read when asked for."""

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
        """List the pictures and decode each once, so that every bad file is known by name.

        Raises:
            BadFile: a file does not decode and `on_bad_file` is "fail".
            DatasetError: no root, no pictures, fewer than two classes, an empty class, bad metadata. Says what to do.
        """
        check_root(config.root, config.split, config.layout)
        listed = list_split(config.root, config.split, config.layout)
        classes = tuple(config.classes or class_names(config.root, config.split, config.layout))[: config.max_classes]
        dataset = cls._decoded(config, _capped(listed, classes, config), classes)
        _check_balance(dataset.samples, classes, config)
        return dataset

    @classmethod
    def open_identities(cls, config: DatasetConfig) -> Dataset:
        """As `open`, for a split to search in, not to learn: its classes are the identities it shows, be it only one.

        `classes`, `max_classes` and `max_per_class` are about what is learnt, and say nothing here.
        """
        check_root(config.root, config.split, config.layout)
        listed = [replace(item, label=str(item.label)) for item in list_split(config.root, config.split, config.layout)]
        dataset = cls._decoded(config, listed, tuple(sorted({str(item.label) for item in listed})))
        _check_any(dataset.samples, config)
        return dataset

    @classmethod
    def _decoded(cls, config: DatasetConfig, listed: Sequence[Listed], classes: tuple[str, ...]) -> Dataset:
        labels = {name: label for label, name in enumerate(classes)}
        entries = [_entry(config, item, classes, labels) for item in listed]
        bad = find_bad(entries, config)
        _report(bad, config.on_bad_file)
        paths = {report.path for report in bad}
        good = [entry for entry in entries if entry.path not in paths]
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

    def image(self, sample: int | str) -> np.ndarray:
        """Decode one picture, by index or id.

        Returns:
            uint8 RGB [H, W, 3].

        Raises:
            BadFile: the file changed since the dataset was opened and cannot be read any more.
        """
        entry = self.by_id(sample) if isinstance(sample, str) else self.samples[sample]
        try:
            return _decode(entry.path, self._max_pixels, self._places)
        except (OSError, InvalidImage) as error:
            raise BadFile(f"{entry.path} cannot be read any more ({error}): restore it and start again") from error


def find_bad(entries: Sequence[Entry], config: DatasetConfig) -> list[BadFileReport]:
    """Decode each picture once: those that are none, are too large or lead out of the dataset, in order."""
    places = config.places()
    with ThreadPoolExecutor(config.threads) as pool:
        reasons = list(pool.map(lambda entry: _fault(entry.path, config.max_pixels, places), entries))
    return [BadFileReport(e.path, reason) for e, reason in zip(entries, reasons, strict=True) if reason is not None]


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
    return Entry(sample_id(item.relative), label, classes[label], item.caption, path, item.relative, item.camera)


def _decode(path: Path, max_pixels: int, places: Sequence[Path] | None) -> np.ndarray:
    real = path.resolve()
    if places is not None and not any(real.is_relative_to(place) for place in places):
        raise InvalidImage(f"it leads out of the dataset, to {real}: copy the file, or name its folder in `links_to`")
    return codec.image_from_bytes(real.read_bytes(), max_pixels=max_pixels)


def _fault(path: Path, max_pixels: int, places: Sequence[Path]) -> str | None:
    """Why a file is bad; None when it is good."""
    try:
        _decode(path, max_pixels, places)
    except InvalidImage as error:
        return error.message
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None


def _report(bad: Sequence[BadFileReport], on_bad_file: str) -> None:
    if bad and on_bad_file == "fail":
        more = f" (and {len(bad) - 1} more bad files)" if len(bad) > 1 else ""
        raise BadFile(f'{bad[0].path}: {bad[0].reason}{more}. Repair or remove it, or set on_bad_file = "skip"')
    for report in bad:
        log.warning("skipped %s: %s", report.path, report.reason)


def _check_balance(entries: Sequence[Entry], classes: tuple[str, ...], config: DatasetConfig) -> None:
    """At least two classes, each with a picture."""
    place = _check_any(entries, config)
    if len(classes) < 2:
        raise DatasetError(f"{place} has one class only ({classes[0]}): a classifier needs two at least")
    counts = Counter(entry.label for entry in entries)
    empty = [name for label, name in enumerate(classes) if not counts[label]]
    if empty:
        raise DatasetError(
            f"{place} has no images of class {', '.join(map(repr, empty[:20]))}: add some, or remove the class"
        )


def _check_any(entries: Sequence[Entry], config: DatasetConfig) -> Path:
    """At least one picture. Returns where they are."""
    place = split_folder(config.root, config.split, config.layout)
    if not entries:
        raise DatasetError(f"{place} has no images: put them in class folders, or list them in metadata.jsonl")
    return place
