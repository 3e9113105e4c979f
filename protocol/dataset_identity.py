"""Published layouts of identity data sets: whom a file shows, and by which camera, as far as names tell.

Market-1501 and CUHK03-NP keep pictures in bounding_box_train, query and bounding_box_test, and name identity and camera
in the file: `0002_c1s1_000451_03.jpg`, `0001_c1_1.png`. CASIA-WebFace has a folder of seven digits for each identity.
Knows nothing of pixels, nor of any other layout.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from protocol.errors import DatasetError

BOX_FOLDERS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}  # split -> folder
JUNK = "-1"  # a box that overlaps a person too little or too much to count: left out of everything
DISTRACTOR = "0000"  # a box of nobody, in the gallery alone
DEBRIS = {"thumbs.db", "desktop.ini"}  # that file managers leave behind
_BOX = re.compile(r"(-1|\d{4,})_c(\d+)(?:s\d+)?_[^/\\]+\.(?:jpe?g|png|bmp)", re.IGNORECASE)


@dataclass(frozen=True)
class Box:
    """A picture of one person."""

    path: Path
    identity: str  # digits; DISTRACTOR: nobody
    camera: str  # digits


def has_boxes(root: Path) -> bool:
    """Whether the folder is laid out as Market-1501 or CUHK03-NP."""
    return any((root / BOX_FOLDERS[split]).is_dir() for split in ("train", "gallery"))


def box_folder(split: str) -> str:
    """Folder of a split: "train", "query", "gallery", or any folder by its own name."""
    return BOX_FOLDERS.get(split, split)


def check_boxes(root: Path, split: str | None) -> None:
    """Raises DatasetError when the split of Market-1501 or CUHK03-NP is not there."""
    if not has_boxes(root):
        inner = [path.name for path in sorted(root.iterdir()) if path.is_dir() and has_boxes(path)]
        raise DatasetError(
            f"{root} has neither bounding_box_train nor bounding_box_test: set `root` to "
            + (" or ".join(str(root / name) for name in inner) or "the folder that has them")
        )
    there = [split for split, folder in BOX_FOLDERS.items() if (root / folder).is_dir()]
    if split is None:
        raise DatasetError(f"{root} holds splits, not classes: set `split` to one of {', '.join(there)}")
    if box_folder(split) not in BOX_FOLDERS.values() or not (root / box_folder(split)).is_dir():
        raise DatasetError(f"{root} has no split {split!r} (it has {', '.join(there)}): check `split`")


def boxes(folder: Path) -> Iterator[Box]:
    """Every picture of the folder but the junk.

    Raises:
        DatasetError: a name that says neither identity nor camera, or a distractor outside the gallery.
    """
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name.lower() in DEBRIS:
            continue
        match = _BOX.fullmatch(path.name)
        if match is None:
            raise DatasetError(
                f"{path}: expected a name such as 0002_c1s1_000451_03.jpg (Market-1501) or 0001_c1_1.png (CUHK03-NP): "
                "identity, camera, number. Rename or remove it"
            )
        identity, camera = match.groups()
        if identity == JUNK:
            continue
        if identity == DISTRACTOR and folder.name != BOX_FOLDERS["gallery"]:
            raise DatasetError(
                f"{path}: identity {DISTRACTOR} stands for distractors, which only {BOX_FOLDERS['gallery']} has: "
                "move it there, or give it its identity"
            )
        yield Box(path, identity, camera)


def check_webface(folders: Sequence[str], place: Path) -> None:
    """Raises DatasetError when a folder is not named as the identities of CASIA-WebFace are."""
    for name in folders:
        if not (name.isascii() and name.isdigit()):
            raise DatasetError(
                f"{place / name}: expected folders named by digits such as 0000045, one for each identity of "
                'CASIA-WebFace: move it away, or set layout = "imagefolder"'
            )
