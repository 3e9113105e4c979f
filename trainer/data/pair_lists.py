"""The pairs of face verification, read from the lists that their authors published.

Each reader gives pairs of paths below the folder with the pictures. Reads lists, never pictures, and only text: the
.mat and .bin files that some sets also come as are not read. Knows nothing of where a set keeps its files.
"""

from __future__ import annotations

import csv
import posixpath
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from protocol.errors import DatasetError

FOLDS = 10


@dataclass(frozen=True)
class Pair:
    """Two pictures, and whether they show the same person."""

    first: str  # path below the folder with the pictures, "/" between the parts
    second: str
    same: bool
    fold: int | None  # 0..9; None: the list does not say
    where: str  # file and line, for messages


def lfw(path: Path) -> Iterator[Pair]:
    """`name i j` or `name1 i name2 j` on each line (LFW, RFW). Pictures are name/name_0001.jpg.

    A first line of two numbers, as LFW has it, says how many folds there are, and how many pairs of the same and then
    of different people each of them has. Without it no fold is known.

    Raises:
        DatasetError: names the line.
    """
    lines = list(_lines(path))
    header, size = lines[0][1].split(), None
    if len(header) <= 2 and all(field.isdecimal() for field in header):
        size = _fold_size(header, lines[0][0], len(lines) - 1)
        lines = lines[1:]
    for index, (where, line) in enumerate(lines):
        fields = line.split()
        if len(fields) == 3:
            fields = [fields[0], fields[1], fields[0], fields[2]]
        if len(fields) != 4 or not (fields[1].isdecimal() and fields[3].isdecimal()):
            raise DatasetError(f"{where}: expected `name i j` or `name1 i name2 j`, and found {line!r}")
        same, fold = fields[0] == fields[2], None
        if size is not None:
            fold = index // (2 * size)
            if same != (index % (2 * size) < size):
                raise DatasetError(
                    f"{where}: expected {size} pairs of the same person and then {size} of different in each fold, "
                    f"and found {line!r} as pair {index % (2 * size) + 1} of fold {fold + 1}"
                )
        pictures = (f"{name}/{name}_{int(number):04d}.jpg" for name, number in (fields[:2], fields[2:]))
        yield Pair(*(inside(picture, where) for picture in pictures), same, fold, where)


def _fold_size(header: list[str], where: str, pairs: int) -> int:
    """Pairs of the same people in a fold, which are as many as of different ones."""
    numbers = [int(field) for field in header]
    if len(numbers) != 2 or numbers[0] != FOLDS:
        raise DatasetError(
            f"{where}: expected `{FOLDS} 300`, the folds and the pairs of either kind in each, and found "
            f"{' '.join(header)!r}: take pairs.txt, the list of View 2"
        )
    if pairs != 2 * numbers[0] * numbers[1]:
        raise DatasetError(
            f"{where}: says {numbers[0]} folds of {numbers[1]} + {numbers[1]} pairs, and {pairs} lines follow, "
            f"not {2 * numbers[0] * numbers[1]}: take the whole list"
        )
    return numbers[1]


def two_lines(path: Path) -> Iterator[Pair]:
    """`picture number` on two lines for each pair (CALFW, CPLFW): 0 for different people, else the fold from 1 on.

    A list whose numbers are all 0 and 1 only says which are the same; pairs of different people have no fold there.

    Raises:
        DatasetError: names the line.
    """
    lines = [(where, line, line.split()) for where, line in _lines(path)]
    for where, line, fields in lines:
        if len(fields) != 2 or not fields[1].isdecimal() or int(fields[1]) > FOLDS:
            raise DatasetError(f"{where}: expected a picture and a number from 0 to {FOLDS}, and found {line!r}")
    if len(lines) % 2:
        raise DatasetError(f"{lines[-1][0]}: expected two lines for each pair, and the last has no second")
    flags = all(int(fields[1]) <= 1 for _, _, fields in lines)
    for (where, _, one), (other, line, two) in zip(lines[::2], lines[1::2], strict=True):
        if one[1] != two[1]:
            raise DatasetError(f"{other}: expected number {one[1]}, as on the line before of this pair, found {line!r}")
        number = int(one[1])
        fold = None if flags or number == 0 else number - 1
        yield Pair(inside(one[0], where), inside(two[0], other), number > 0, fold, where)


def flagged(path: Path) -> Iterator[Pair]:
    """`picture1 picture2 same` on each line, same being 1 or 0 (AgeDB-30). No fold is known.

    Raises:
        DatasetError: names the line.
    """
    for where, line in _lines(path):
        fields = line.split()
        if len(fields) != 3 or fields[2] not in ("0", "1"):
            raise DatasetError(f"{where}: expected `picture1 picture2 1` or `picture1 picture2 0`, and found {line!r}")
        yield Pair(inside(fields[0], where), inside(fields[1], where), fields[2] == "1", None, where)


def table(path: Path) -> Iterator[Pair]:
    """CSV with the header first,second,same or first,second,same,fold: same is 1 or 0, folds count from 0.

    Raises:
        DatasetError: names the line.
    """
    lines = list(_lines(path))
    header = ["first", "second", "same"]
    found = next(csv.reader([lines[0][1]]))
    if found not in (header, [*header, "fold"]):
        raise DatasetError(f"{lines[0][0]}: expected the header first,second,same[,fold], and found {lines[0][1]!r}")
    for where, line in lines[1:]:
        fields = next(csv.reader([line]))
        fold = fields[3] if len(fields) == len(found) == 4 else "0"
        if len(fields) != len(found) or fields[2] not in ("0", "1") or fold not in map(str, range(FOLDS)):
            raise DatasetError(
                f"{where}: expected {','.join(found)} with same 0 or 1"
                + (f" and fold 0 to {FOLDS - 1}" if len(found) == 4 else "")
                + f", and found {line!r}"
            )
        first, second = inside(fields[0], where), inside(fields[1], where)
        yield Pair(first, second, fields[2] == "1", int(fold) if len(found) == 4 else None, where)


def cfp_fp(protocol: Path) -> Iterator[Pair]:
    """The frontal-profile pairs of CFP: `i,j` on each line of Split/FP/01..10/{same,diff}.txt are the numbers of a
    picture in Pair_list_F.txt and of one in Pair_list_P.txt. Pictures are below Data/Images.

    Raises:
        DatasetError: names the line.
    """
    frontal, profile = (_numbered(protocol / f"Pair_list_{pose}.txt") for pose in "FP")
    for fold in range(FOLDS):
        for name in ("same", "diff"):
            for where, line in _lines(protocol / "Split" / "FP" / f"{fold + 1:02d}" / f"{name}.txt"):
                numbers = [field.strip() for field in line.split(",")]
                if len(numbers) != 2 or not all(map(str.isdecimal, numbers)):
                    raise DatasetError(f"{where}: expected `i,j`, and found {line!r}")
                first, second = map(int, numbers)
                if first not in frontal or second not in profile:
                    lacking = (
                        f"F.txt has no picture {first}" if first not in frontal else f"P.txt has no picture {second}"
                    )
                    raise DatasetError(f"{where}: Pair_list_{lacking} ({line!r})")
                yield Pair(frontal[first], profile[second], name == "same", fold, where)


def _numbered(path: Path) -> dict[int, str]:
    """Number -> path below Data/Images, of a list of `number ../Data/Images/...` lines."""
    found = {}
    for where, line in _lines(path):
        number, picture = (*line.split(maxsplit=1), "")[:2]
        inner = posixpath.normpath(posixpath.join("Protocol", picture))
        if not number.isdecimal() or not inner.startswith("Data/Images/"):
            raise DatasetError(f"{where}: expected `1 ../Data/Images/001/frontal/01.jpg`, and found {line!r}")
        found[int(number)] = inside(inner.removeprefix("Data/Images/"), where)
    return found


def inside(picture: str, where: str) -> str:
    """The path in its shortest form. Raises DatasetError when it leads out of the folder with the pictures."""
    path = posixpath.normpath(picture)
    if not picture or posixpath.isabs(path) or path.split("/")[0] in ("..", ".") or "\\" in path:
        raise DatasetError(f"{where}: {picture!r} is no path below the folder with the pictures, with '/'")
    return path


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Each line that says something, stripped, and where it stands."""
    if not path.is_file():
        raise DatasetError(f"the list {path} does not exist: restore it, or check `pairs`")
    body = path.read_bytes()
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is not text: .mat and .bin files are not read, take a list of pairs") from error
    if "\0" in text:
        raise DatasetError(f"{path} is not text: .mat and .bin files are not read, take a list of pairs")
    lines = [(f"{path}, line {number}", line.strip()) for number, line in enumerate(text.splitlines(), start=1)]
    if not any(line for _, line in lines):
        raise DatasetError(f"{path} is empty: take a list of pairs")
    yield from ((where, line) for where, line in lines if line)


READERS: dict[str, Callable[[Path], Iterator[Pair]]] = {
    "lfw": lfw,
    "agedb-30": flagged,
    "cfp-fp": cfp_fp,
    "calfw": two_lines,
    "cplfw": two_lines,
    "rfw": lfw,
    "csv": table,
}
