"""Neutral frames of a dataset's clips, that clips of scarce classes begin with: the identities of ARGen, D2.

All classes are looked at; who plans chooses among them. What each clip shows is found by `examination`; beside it the
action units of each class are written, see `statistics`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from generator_service.faces import statistics
from generator_service.faces.examination import Examined, Reason, examine
from generator_service.faces.interface import FaceReader, FacesConfig, open_reader
from protocol.dataset import Dataset
from protocol.errors import ConfigError, NoFace

ADVICE: dict[Reason, str] = {  # what to do where most clips are left out for this
    "small": "frames are smaller than generator.faces.min_side: lower it",
    "blurred": "frames are less sharp than generator.faces.min_sharpness: lower it",
    "dark": "frames are darker than generator.faces.min_brightness: lower it",
    "bright": "frames are brighter than generator.faces.max_brightness: raise it",
    "low_contrast": "frames have less contrast than generator.faces.min_contrast: lower it",
    "no_face": "no face is found: check that frames are crops of faces, and the reader, or lower "
    "generator.faces.min_presence",
    "undecodable": "clips cannot be read any more: restore the dataset",
    "unread": "the reader has stored nothing of them, and reads no pixels: store it, or use another "
    "generator.faces.reader",
}


@dataclass(frozen=True)
class Identity:
    """A frame that clips can begin with."""

    sample_id: str  # of the clip
    frame: int
    label: int
    class_name: str
    subject: str | None  # None: not known
    intensity: float  # mean of the action units there (eq. 23)
    sharpness: float  # eq. 22


@dataclass(frozen=True)
class Report:
    """What became of the clips."""

    clips: Mapping[str, int]  # of each class
    usable: Mapping[str, int]  # of each class, with a neutral frame
    left_out: Mapping[Reason, int]  # of all classes, the most frequent reason first

    def __str__(self) -> str:
        left_out = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in self.left_out.items())
        told = f"{sum(self.usable.values())} of {sum(self.clips.values())} clips have a neutral frame"
        return told + (f"; left out: {left_out}" if left_out else "")


class Identities(Sequence[Identity]):
    """In the order of the dataset."""

    def __init__(self, dataset: Dataset, found: Sequence[Identity], report: Report, patterns: Mapping[str, Any]):
        """Most callers want `open`."""
        self.report = report
        self.patterns = patterns  # of each class, as in action_units.json
        self._dataset, self._found = dataset, tuple(found)

    @classmethod
    def open(
        cls,
        dataset: Dataset,
        config: FacesConfig,
        folder: Path,
        *,
        reader: FaceReader | None = None,
        on_clip: Callable[[int, int], None] = lambda done, total: None,
    ) -> Identities:
        """Find them, or what is not known yet of them, and write the statistics of action units.

        Args:
            folder: where what is found is kept.
            reader: None: the one that the settings name.
            on_clip: called with the clips done, and the clips in all.

        Raises:
            ConfigError: the dataset has no clips, or there is no such reader.
            NoFace: no clip has a frame that can be used; says by which gate most fail, and what to change.
        """
        if not dataset.is_clips:
            raise ConfigError('neutral frames are of clips, and the dataset has images: set its layout to "clips"')
        reader = reader or open_reader(config)
        clips = examine(dataset, config, reader, folder, on_clip)
        classes = {name: _mined(dataset, clips, name, config) for name in dataset.classes}
        statistics.write(folder, reader.units, classes)
        report = _report(dataset, clips)
        if not sum(report.usable.values()):
            reason = next(iter(report.left_out))
            raise NoFace(f"no clip has a frame to begin others with. {report}. Most often, {ADVICE[reason]}")
        found = [
            Identity(entry.id, one.neutral.frame, entry.label, entry.class_name, entry.subject, one.neutral.intensity,
                     one.neutral.sharpness)
            for entry, one in zip(dataset.samples, clips, strict=True)
            if one.neutral is not None
        ]  # fmt: skip
        return cls(dataset, found, report, {name: patterns for name, (_, patterns) in classes.items()})

    def __len__(self) -> int:
        return len(self._found)

    @overload
    def __getitem__(self, index: int) -> Identity: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Identity]: ...

    def __getitem__(self, index: int | slice) -> Identity | Sequence[Identity]:
        return self._found[index]

    def __iter__(self) -> Iterator[Identity]:
        return iter(self._found)

    def image(self, identity: Identity) -> np.ndarray:
        """Its pixels, uint8 RGB [H, W, 3]. Raises BadFile."""
        return self._dataset.image(identity.sample_id, identity.frame)


def _mined(
    dataset: Dataset, clips: Sequence[Examined], class_name: str, config: FacesConfig
) -> tuple[int, list[dict[str, Any]]]:
    """Clips of a class with an apex, and its patterns."""
    shown = [
        one.units
        for entry, one in zip(dataset.samples, clips, strict=True)
        if entry.class_name == class_name and one.apex is not None
    ]
    options = {"threshold": config.unit_threshold, "min_support": config.min_support, "max_units": config.max_units}
    return len(shown), statistics.patterns(shown, **options)


def _report(dataset: Dataset, clips: Sequence[Examined]) -> Report:
    both = list(zip(dataset.samples, clips, strict=True))
    left_out = Counter(one.left_out for one in clips if one.left_out is not None)
    left_out["undecodable"] += len(dataset.bad_files)
    usable = Counter(entry.class_name for entry, one in both if one.neutral is not None)
    return Report(
        clips={name: sum(entry.class_name == name for entry in dataset.samples) for name in dataset.classes},
        usable={name: usable[name] for name in dataset.classes},
        left_out={reason: count for reason, count in left_out.most_common() if count},
    )
