"""How a dataset folder is laid out: which pictures or clips it lists, under which labels, by which camera they were
taken, and whom they show.

Reads names and metadata, never pixels. Names are compared in Unicode's composed form (NFC), so that the same dataset
reads the same on file systems that store names decomposed.
"""

from __future__ import annotations

import json
import posixpath
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from protocol import clips
from protocol.dataset_clips import CLASSES, Shown, published_clips, told_by_folders
from protocol.dataset_identity import box_folder, boxes, check_boxes, check_webface, has_boxes
from protocol.errors import DatasetError

METADATA = "metadata.jsonl"
Layout = Literal[
    "auto", "imagefolder", "market1501", "cuhk03-np", "casia-webface", "clips", "dfew", "ferv39k", "ckplus"
]
SPLITS = ("train", "test", "val", "validation")


@dataclass(frozen=True)
class Listed:
    """One file that a dataset names."""

    relative: str  # to root, with the split, "/" between the parts, NFC: the sample's identity
    on_disk: str  # the same path as the file system spells it
    label: int | str
    caption: str | None
    where: str  # what named it, for messages
    camera: str | None = None  # or whatever stands for the view; None: not known
    subject: str | None = None  # whom it shows, where that is not the label; None: not known
    is_clip: bool = False  # a folder of frames or a file of moving pictures; false: a picture


def in_boxes(root: Path, layout: Layout = "auto") -> bool:
    """Whether the dataset is laid out as Market-1501 and CUHK03-NP; "auto" tells by its folders."""
    if layout == "auto":
        return has_boxes(root) and not (root / METADATA).exists()
    return layout in ("market1501", "cuhk03-np")


def split_folder(root: Path, split: str | None, layout: Layout = "auto") -> Path:
    """The folder that a split's samples and metadata are in."""
    if split is None or clips_layout(root, layout) is not None:
        return root
    return root / (box_folder(split) if in_boxes(root, layout) else split)


def clips_layout(root: Path, layout: Layout = "auto") -> str | None:
    """ "dfew", "ferv39k" or "ckplus" where the dataset is laid out as one of these; "auto" tells by its folders."""
    if layout == "auto":
        return None if (root / METADATA).exists() else told_by_folders(root)
    return layout if layout in CLASSES else None


def check_root(root: Path, split: str | None, layout: Layout = "auto", fold: int | None = None) -> None:
    """Raises DatasetError when the folder to read is not there, is one level too high, or is not in this layout."""
    if not root.is_dir():
        raise DatasetError(f"the dataset folder {root} does not exist: check `root`")
    if (published := clips_layout(root, layout)) is not None:
        published_clips(root, published, split, fold)
        return None
    if fold is not None:
        raise DatasetError(f"fold = {fold} is for DFEW, and {root} is not laid out so: leave it out", param="fold")
    if in_boxes(root, layout) or (layout == "auto" and _holds_boxes(root)):
        return check_boxes(root, split)
    if split is not None:
        if not (root / split).is_dir():
            there = ", ".join(_folders(root)) or "nothing"
            raise DatasetError(f"{root} has no split {split!r} (it has {there}): check `split`")
    elif not (root / METADATA).exists() and (found := _folders(root)) and set(found) <= set(SPLITS):
        raise DatasetError(f"{root} holds splits ({', '.join(found)}), not classes: set `split` to one of them")
    folder = split_folder(root, split, layout)
    if layout == "casia-webface" and not (folder / METADATA).exists():
        check_webface(_folders(folder), folder)


def list_split(root: Path, split: str | None, layout: Layout = "auto", fold: int | None = None) -> list[Listed]:
    """Every file of the split, in the order of `relative`. Raises DatasetError for bad metadata or names."""
    folder = split_folder(root, split, layout)
    path = folder / METADATA
    if (published := clips_layout(root, layout)) is not None:
        found = _from_published(root, published_clips(root, published, split, fold))
    elif path.exists():
        found = (item for item, _ in parse_metadata(path.read_bytes(), root, path))
        found = (replace(item, is_clip=layout == "clips") for item in found)
    elif layout == "clips":
        found = _from_clips(root, folder)
    elif in_boxes(root, layout):
        found = _from_boxes(root, folder)
    else:
        found = _from_folders(root, folder)
    listed = sorted(found, key=lambda item: item.relative)
    if layout == "auto" and all(clips.is_moving(root / item.on_disk) for item in listed):
        listed = [replace(item, is_clip=True) for item in listed]
    return listed


def class_names(root: Path, split: str | None, layout: Layout = "auto") -> tuple[str, ...]:
    """Label -> name over all splits beside this one, so that labels agree between them.

    Names are sorted; int labels are named by their digits, from 0 to the largest. The splits of Market-1501 and
    CUHK03-NP show different people: each has names of its own. Published sets of clips name theirs.
    """
    if (published := clips_layout(root, layout)) is not None:
        return CLASSES[published]
    if in_boxes(root, layout):
        return tuple(sorted({str(item.label) for item in list_split(root, split, layout)}))
    splits = [None] if split is None else [s for s in dict.fromkeys((split, *SPLITS)) if (root / s).is_dir()]
    labels: set[int | str] = set()
    for one in splits:
        folder = root if one is None else root / one
        if (folder / METADATA).exists():
            labels |= {item.label for item in list_split(root, one, "imagefolder")}
        else:
            labels |= {_nfc(name) for name in _folders(folder)}
    numbers = [label for label in labels if isinstance(label, int)]
    if numbers and len(numbers) < len(labels):
        raise DatasetError(f"{root}: some labels are ints and some are names: use one kind in every split")
    if numbers:
        return tuple(str(label) for label in range(max(numbers) + 1))
    return tuple(sorted(str(label) for label in labels))


def _folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _holds_boxes(root: Path) -> bool:
    """Whether this is the folder above: CUHK03-NP has one for detected and one for labeled boxes."""
    return not (root / METADATA).exists() and any(has_boxes(root / name) for name in ("detected", "labeled"))


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _from_folders(root: Path, folder: Path) -> Iterator[Listed]:
    for name in _folders(folder):
        for path in (folder / name).rglob("*"):
            inside = path.relative_to(folder)
            if path.is_file() and not any(part.startswith(".") for part in inside.parts):
                on_disk = path.relative_to(root).as_posix()
                yield Listed(_nfc(on_disk), on_disk, _nfc(name), None, str(path))


def _from_clips(root: Path, folder: Path) -> Iterator[Listed]:
    """Each file and folder in a class folder is a clip."""
    for name in _folders(folder):
        for path in (folder / name).iterdir():
            if not path.name.startswith("."):
                on_disk = path.relative_to(root).as_posix()
                yield Listed(_nfc(on_disk), on_disk, _nfc(name), None, str(path), is_clip=True)


def _from_published(root: Path, shown: Iterator[Shown]) -> Iterator[Listed]:
    seen: dict[Path, str] = {}
    for clip in shown:
        if clip.path in seen:
            raise DatasetError(f"{clip.where}: {clip.path.name} is listed before, in {seen[clip.path]}: keep one")
        seen[clip.path] = clip.where
        on_disk = clip.path.relative_to(root).as_posix()
        yield Listed(_nfc(on_disk), on_disk, clip.class_name, None, clip.where, subject=clip.subject, is_clip=True)


def _from_boxes(root: Path, folder: Path) -> Iterator[Listed]:
    for box in boxes(folder):
        on_disk = box.path.relative_to(root).as_posix()
        yield Listed(_nfc(on_disk), on_disk, box.identity, None, str(box.path), box.camera)


def parse_metadata(body: bytes, root: Path, path: Path) -> Iterator[tuple[Listed, bytes]]:
    """Each line of a metadata file that says something, and what it says.

    Args:
        body: of the file. path: where it lies, or is to lie, under root.

    Raises:
        DatasetError: names the line.
    """
    prefix = path.parent.relative_to(root).as_posix()
    seen: dict[str, int] = {}
    for number, line in enumerate(body.splitlines(), start=1):
        if not line.strip():
            continue
        item = _parse(line, prefix, f"{path}, line {number}")
        if item.relative in seen:
            raise DatasetError(
                f"{item.where}: {item.relative} is listed before, on line {seen[item.relative]}: keep one"
            )
        seen[item.relative] = number
        yield item, line


def _parse(line: bytes, prefix: str, where: str) -> Listed:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise DatasetError(f"{where}: not valid JSON ({error}): write one object on each line") from error
    if not isinstance(row, dict):
        raise DatasetError(f"{where}: not a JSON object: write one object on each line")
    name, label = row.get("file_name"), row.get("label")
    caption = row.get("caption", row.get("text"))
    if not isinstance(name, str) or not name:
        raise DatasetError(f"{where}: `file_name` must be the path of an image or a clip, beside this file")
    if isinstance(label, bool) or not isinstance(label, int | str) or label == "":
        raise DatasetError(f"{where}: `label` must be a class name or an int, and is {label!r}")
    if caption is not None and not isinstance(caption, str):
        raise DatasetError(f"{where}: the caption must be a text, and is {caption!r}")
    camera, subject = (_view(row, key, where) for key in ("camera", "subject"))
    inside = posixpath.normpath(name)
    if posixpath.isabs(inside) or inside.split("/")[0] == ".." or "\\" in inside or "\0" in inside:
        raise DatasetError(f"{where}: {name!r} leads out of the dataset folder: use paths below it, with '/'")
    on_disk = posixpath.normpath(posixpath.join(prefix, inside))
    label = _nfc(label) if isinstance(label, str) else label
    return Listed(_nfc(on_disk), on_disk, label, caption, where, camera, subject)


def _view(row: Mapping[str, Any], key: str, where: str) -> str | None:
    """A camera or a subject: its name."""
    value = row.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | str) or value == ""):
        raise DatasetError(f"{where}: `{key}` must be a name or an int, and is {value!r}")
    return None if value is None else _nfc(str(value))
