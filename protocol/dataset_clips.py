"""Published layouts of sets of expression clips: which clips they list, what each shows, and whose face it is.

DFEW and FERV39k have lists of clips for each split (DFEW for each of five folds as well), CK+ a folder of frames for
each sequence and a file of its emotion. Their classes have the same names here. Knows nothing of pixels, nor of any
other layout.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from protocol import clips
from protocol.errors import DatasetError

EMOTIONS = ("happy", "sad", "neutral", "angry", "surprise", "disgust", "fear")  # as DFEW numbers them, from 1
CLASSES: Mapping[str, tuple[str, ...]] = {
    "dfew": EMOTIONS,
    "ferv39k": EMOTIONS,
    "ckplus": tuple(name for name in EMOTIONS if name != "neutral"),  # its sequences begin neutral, and none stays so
}
MARKS = {  # layout -> folders, one of which tells it
    "dfew": ("EmoLabel_DataSplit",),
    "ferv39k": ("4_setups",),
    "ckplus": ("cohn-kanade-images", "extended-cohn-kanade-images"),
}
SPLITS = ("train", "test")
FOLDS = 5  # of DFEW
DFEW_CLIPS = ("clip_224x224", "clip_224x224_16f", "jpg_256")  # folders of clips by preference; others come after
CKPLUS_CODES = {0: "neutral", 1: "angry", 2: None, 3: "disgust", 4: "fear", 5: "happy", 6: "sad", 7: "surprise"}  # 2 is
# contempt, which is not among the seven


@dataclass(frozen=True)
class Shown:
    """One clip that a published list names."""

    path: Path  # folder of frames or file, be it there or not
    class_name: str
    where: str  # what named it, for messages
    subject: str | None = None


def told_by_folders(root: Path) -> str | None:
    """The published layout that a folder is in; None: none of these."""
    return next((layout for layout, names in MARKS.items() if any((root / name).is_dir() for name in names)), None)


def published_clips(root: Path, layout: str, split: str | None, fold: int | None) -> Iterator[Shown]:
    """Every labelled clip of a split.

    Args:
        layout: "dfew", "ferv39k" or "ckplus".
        split: "train" or "test"; of CK+, which has none, None.
        fold: of DFEW, 1 to 5; None for the others.

    Raises:
        DatasetError: a list or folder that is expected is not there, or a line of a list cannot be read.
    """
    if layout != "dfew" and fold is not None:
        raise DatasetError(f"fold = {fold} is for DFEW, and {root} is read as {layout}: leave it out", param="fold")
    if layout == "ckplus":
        if split is not None:
            raise DatasetError(f"{root}: CK+ has no split {split!r}, it is one set of clips: leave `split` out")
        return _ckplus(root)
    if split not in SPLITS:
        raise DatasetError(f"{root}: {layout} has the splits train and test: set `split` to one of them")
    return _dfew(root, split, fold) if layout == "dfew" else _ferv39k(root, split)


def _dfew(root: Path, split: str, fold: int | None) -> Iterator[Shown]:
    """EmoLabel_DataSplit/train(single-labeled)/set_1.csv with lines `video_name,label`, and Clip/clip_224x224/00001."""
    if fold is None or not 1 <= fold <= FOLDS:
        raise DatasetError(f"{root}: DFEW is split in {FOLDS} ways: set `fold` to one of 1 to {FOLDS}", param="fold")
    names = (f"EmoLabel_DataSplit/{part}/set_{fold}.csv" for part in (f"{split}(single-labeled)", split))
    path = _first([root / name for name in names], Path.is_file, "DFEW's list")
    known = _dfew_clips(root)
    folder = next(iter(known.values())).parent
    for where, (name, label) in _rows(path, ","):
        number = posixpath.splitext(name.rsplit("/")[-1])[0]
        if not number.isdecimal():
            raise DatasetError(f"{where}: expected the number of a clip and a label such as 1,3, and found {name!r}")
        if not label.isdecimal() or not 1 <= int(label) <= len(EMOTIONS):
            raise DatasetError(f"{where}: DFEW's labels are 1 to {len(EMOTIONS)}, and this is {label!r}: correct it")
        clip = known.get(int(number), folder / f"{int(number):05d}")
        yield Shown(clip, EMOTIONS[int(label) - 1], where)


def _dfew_clips(root: Path) -> dict[int, Path]:
    """The clips of one folder of them by number, whether it holds them itself or in parts."""
    places = [path for above in (root / "Clip", root) for path in _folders(above)]
    preferred = {name: rank for rank, name in enumerate(DFEW_CLIPS)}
    for place in sorted(places, key=lambda path: preferred.get(path.name, len(preferred))):
        numbered = {int(path.stem): path for path in _clips_below(place) if path.stem.isdecimal()}
        if numbered:
            return numbered
    raise DatasetError(
        f"{root} has no clips of DFEW: expected folders of frames such as Clip/clip_224x224/00001 or "
        "Clip/clip_224x224_16f/00001, or videos such as Clip/original/part_1/1.mp4"
    )


def _clips_below(place: Path) -> Iterator[Path]:
    """Its folders and videos with a number, and those of its parts."""
    for path in sorted(place.iterdir()):
        if path.is_dir() and not path.name.isdecimal():
            yield from (inner for inner in sorted(path.iterdir()) if inner.is_dir() or clips.is_clip_file(inner))
        elif path.is_dir() or clips.is_clip_file(path):
            yield path


def _ferv39k(root: Path, split: str) -> Iterator[Shown]:
    """4_setups/All_scenes/train_All.csv with lines `Action/Sad/0010 Sad`, and 2_ClipsforFaceCrop/Action/Sad/0010."""
    lists = [root / name / f"{split}_All.csv" for name in ("4_setups/All_scenes", "All_scenes", "")]
    path = _first(lists, Path.is_file, "FERV39k's list")
    inner = "2_ClipsforFaceCrop"
    place = _first([root / inner / inner, root / inner], Path.is_dir, "FERV39k's clips")
    for where, (name, label) in _rows(path, None):
        if label.lower() not in EMOTIONS:
            raise DatasetError(f"{where}: expected a clip and one of {', '.join(EMOTIONS)}, and found {label!r}")
        inside = posixpath.normpath(name.replace("\\", "/"))
        if posixpath.isabs(inside) or inside.split("/")[0] == "..":
            raise DatasetError(f"{where}: {name!r} leads out of the dataset folder: use paths below {place.name}")
        yield Shown(place / inside, label.lower(), where)


def _ckplus(root: Path) -> Iterator[Shown]:
    """cohn-kanade-images/S005/001/*.png, and Emotion/S005/001/S005_001_00000011_emotion.txt, where there is one."""
    images = _first([root / name for name in MARKS["ckplus"]], Path.is_dir, "CK+'s frames")
    emotions = _first([root / "Emotion", root / "Emotion_labels" / "Emotion"], Path.is_dir, "CK+'s emotions")
    for path in sorted(emotions.glob("*/*/*_emotion.txt")):
        text = path.read_text().strip()
        try:
            name = CKPLUS_CODES[int(float(text))]
        except (ValueError, KeyError) as error:
            raise DatasetError(f"{path}: expected a code of 0 to 7, and found {text!r}: correct it") from error
        if name is not None:
            subject = path.parts[-3]
            yield Shown(images / subject / path.parts[-2], name, str(path), subject)


def _first(paths: Sequence[Path], there: Callable[[Path], bool], what: str) -> Path:
    for path in paths:
        if there(path):
            return path
    raise DatasetError(f"{what} was expected as {' or '.join(map(str, paths))}: check `root`, or put it there")


def _folders(above: Path) -> list[Path]:
    return sorted(path for path in above.iterdir() if path.is_dir()) if above.is_dir() else []


def _rows(path: Path, separator: str | None) -> Iterator[tuple[str, tuple[str, str]]]:
    """What each line of a list says, and where: two columns, a header left out. None: any space separates them."""
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        parts = [part.strip() for part in line.split(separator) if part.strip()]
        if not parts or (number == 1 and parts[-1].lower() in ("label", "labels", "emotion", "annotation")):
            continue
        if len(parts) < 2:
            raise DatasetError(f"{path}, line {number}: expected a clip and its label, and found {line!r}: correct it")
        yield f"{path}, line {number}", (parts[0], parts[1])
