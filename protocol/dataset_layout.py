"""How a dataset folder is laid out: which files it lists, under which labels.

Reads names and metadata, never pixels. Names are compared in Unicode's composed form (NFC), so that the same dataset
reads the same on file systems that store names decomposed.
"""

from __future__ import annotations

import json
import posixpath
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocol.errors import DatasetError

METADATA = "metadata.jsonl"
SPLITS = ("train", "test", "val", "validation")


@dataclass(frozen=True)
class Listed:
    """One file that a dataset names."""

    relative: str  # to root, with the split, "/" between the parts, NFC: the sample's identity
    on_disk: str  # the same path as the file system spells it
    label: int | str
    caption: str | None
    where: str  # what named it, for messages


def check_root(root: Path, split: str | None) -> None:
    """Raises DatasetError when the folder to read is not there, or is one level too high."""
    if not root.is_dir():
        raise DatasetError(f"the dataset folder {root} does not exist: check `root`")
    if split is not None:
        if not (root / split).is_dir():
            there = ", ".join(_folders(root)) or "nothing"
            raise DatasetError(f"{root} has no split {split!r} (it has {there}): check `split`")
    elif not (root / METADATA).exists() and (found := _folders(root)) and set(found) <= set(SPLITS):
        raise DatasetError(f"{root} holds splits ({', '.join(found)}), not classes: set `split` to one of them")


def list_split(root: Path, split: str | None) -> list[Listed]:
    """Every file of the split, in the order of `relative`. Raises DatasetError for bad metadata."""
    folder = root if split is None else root / split
    path = folder / METADATA
    if path.exists():
        found = (item for item, _ in parse_metadata(path.read_bytes(), root, path))
    else:
        found = _from_folders(root, folder)
    return sorted(found, key=lambda item: item.relative)


def class_names(root: Path, split: str | None) -> tuple[str, ...]:
    """Label -> name over all splits beside this one, so that labels agree between them.

    Names are sorted; int labels are named by their digits, from 0 to the largest.
    """
    splits = [None] if split is None else [s for s in dict.fromkeys((split, *SPLITS)) if (root / s).is_dir()]
    labels: set[int | str] = set()
    for one in splits:
        folder = root if one is None else root / one
        if (folder / METADATA).exists():
            labels |= {item.label for item in list_split(root, one)}
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


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _from_folders(root: Path, folder: Path) -> Iterator[Listed]:
    for name in _folders(folder):
        for path in (folder / name).rglob("*"):
            inside = path.relative_to(folder)
            if path.is_file() and not any(part.startswith(".") for part in inside.parts):
                on_disk = path.relative_to(root).as_posix()
                yield Listed(_nfc(on_disk), on_disk, _nfc(name), None, str(path))


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
        raise DatasetError(f"{where}: `file_name` must be the path of an image, beside this file")
    if isinstance(label, bool) or not isinstance(label, int | str) or label == "":
        raise DatasetError(f"{where}: `label` must be a class name or an int, and is {label!r}")
    if caption is not None and not isinstance(caption, str):
        raise DatasetError(f"{where}: the caption must be a text, and is {caption!r}")
    inside = posixpath.normpath(name)
    if posixpath.isabs(inside) or inside.split("/")[0] == ".." or "\\" in inside or "\0" in inside:
        raise DatasetError(f"{where}: {name!r} leads out of the dataset folder: use paths below it, with '/'")
    on_disk = posixpath.normpath(posixpath.join(prefix, inside))
    return Listed(_nfc(on_disk), on_disk, _nfc(label) if isinstance(label, str) else label, caption, where)
