"""Sets of face verification by pairs: which pictures there are, which two make a pair, and which fold a pair is in.

Finds the files where their authors put them; `pair_lists` reads the lists. Knows nothing of models, nor of how
verification is scored. Shapes: P pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from protocol.dataset import Dataset, DatasetConfig, Entry, sample_id
from protocol.dataset_files import BadFileReport, check_files
from protocol.errors import BadFile, DatasetError
from trainer.data.pair_lists import FOLDS, READERS, Pair

Group = Literal["African", "Asian", "Caucasian", "Indian"]
LISTS = {
    "lfw": "pairs.txt",
    "agedb-30": "agedb_30_pair.txt",
    "cfp-fp": "Protocol",
    "calfw": "pairs_CALFW.txt",
    "cplfw": "pairs_CPLFW.txt",
    "csv": "pairs.csv",
}  # layout -> the list's published name; RFW has one for each group


class PairsConfig(BaseModel):
    """Which pairs to verify."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1)  # in tables and charts
    layout: Literal["lfw", "agedb-30", "cfp-fp", "calfw", "cplfw", "rfw", "csv"]
    root: Path  # folder of the set, or of its pictures where the list is named
    pairs: Path | None = None  # list of pairs, or the folder it is in; None: its published place, in root or beside it
    group: Group | None = None  # "rfw" only, which has one list for each
    links_to: list[Path] = []  # folders outside root that symbolic links in it may lead to

    @model_validator(mode="after")
    def _group_fits(self) -> PairsConfig:
        if (self.layout == "rfw") != (self.group is not None):
            raise ValueError('group is for layout "rfw", which needs it: African, Asian, Caucasian or Indian')
        return self


@dataclass(frozen=True)
class Pairs:
    """P pairs of pictures; two folds at least, and pairs of both kinds."""

    name: str
    dataset: Dataset  # the distinct pictures, by path; the labels say nothing
    first: Tensor  # int64 [P], index into the dataset
    second: Tensor  # int64 [P]
    same: Tensor  # bool [P]: of one person
    fold: Tensor  # int64 [P], 0..9
    group: str | None


def open_pairs(config: PairsConfig) -> Pairs:
    """Read the list, and decode every picture that it names once.

    A list that says nothing of a pair's fold has its pairs of the same people in ten equal runs, in their order, and
    so those of different people.

    Raises:
        DatasetError: no folder, no list, a malformed line, a missing picture, one kind of pairs only, or one fold.
        BadFile: a picture does not decode.
    """
    if not config.root.is_dir():
        raise DatasetError(f"{config.name}: the folder {config.root} does not exist: check `root`", param="root")
    pairs = list(READERS[config.layout](_list_of(config)))
    _check(pairs, config)
    pictures = sorted({picture for pair in pairs for picture in (pair.first, pair.second)})
    index = {picture: row for row, picture in enumerate(pictures)}
    dataset = _dataset(config, pairs, pictures)
    same = torch.tensor([pair.same for pair in pairs])
    fold = torch.tensor(_folds(pairs))
    if len(fold.unique()) < 2:
        raise DatasetError(f"{config.name}: all pairs are in one fold: a threshold is chosen on the others, add pairs")
    first = torch.tensor([index[pair.first] for pair in pairs])
    second = torch.tensor([index[pair.second] for pair in pairs])
    return Pairs(config.name, dataset, first, second, same, fold, config.group)


def _list_of(config: PairsConfig) -> Path:
    """The list of pairs; of CFP the folder Protocol."""
    if config.layout == "rfw":
        name, places = f"{config.group}/{config.group}_pairs.txt", [config.root / "txts"]
    else:
        name, places = LISTS[config.layout], [config.root, config.root.parent]
    if config.pairs is not None:
        within = config.pairs.is_dir() and config.layout != "cfp-fp"
        return config.pairs / name if within else config.pairs
    for place in places:
        if (place / name).exists():
            return place / name
    raise DatasetError(
        f"{config.name}: no {name} in {' or '.join(map(str, places))}: put it there, or name it in `pairs`",
        param="pairs",
    )


def _images(config: PairsConfig) -> Path:
    """The folder that the list's paths are below: the published one, or root itself."""
    inner = {
        "cfp-fp": "Data/Images",
        "calfw": "aligned images",
        "cplfw": "aligned images",
        "rfw": f"data/{config.group}",
    }
    folder = config.root / inner.get(config.layout, ".")
    return folder if folder.is_dir() else config.root


def _check(pairs: Sequence[Pair], config: PairsConfig) -> None:
    for pair in pairs:
        if pair.first == pair.second:
            raise DatasetError(f"{pair.where}: {pair.first} is paired with itself: name two pictures")
    kinds = {pair.same for pair in pairs}
    if len(kinds) < 2:
        raise DatasetError(
            f"{config.name}: the list needs pairs of the same person and pairs of different ones, and lacks "
            + ("both" if not kinds else "the latter" if True in kinds else "the former")
        )


def _dataset(config: PairsConfig, pairs: Sequence[Pair], pictures: Sequence[str]) -> Dataset:
    folder = _images(config)
    missing = [picture for picture in pictures if not (folder / picture).is_file()]
    if missing:
        where = next(pair.where for pair in pairs if missing[0] in (pair.first, pair.second))
        raise DatasetError(
            f"{where}: {folder / missing[0]} is missing ({len(missing)} of {len(pictures)} pictures are): check "
            "`root`, or restore them"
        )
    paths = [(folder / picture, (folder / picture).relative_to(config.root).as_posix()) for picture in pictures]
    entries = [Entry(sample_id(relative), 0, config.name, None, path, relative) for path, relative in paths]
    place = DatasetConfig(root=config.root, links_to=config.links_to)
    checked = check_files([(entry.path, False) for entry in entries], place)
    bad = [found for found in checked if isinstance(found, BadFileReport)]
    if bad:
        raise BadFile(f"{bad[0].path}: {bad[0].reason} ({len(bad)} of {len(pictures)} pictures are bad). Restore it")
    return Dataset([config.name], entries, (), place.max_pixels, place.places())


def _folds(pairs: Sequence[Pair]) -> list[int]:
    """Fold of each pair: the list's, or else by its place among those of its kind that the list says nothing of."""
    unsaid = Counter(pair.same for pair in pairs if pair.fold is None)
    seen, folds = Counter[bool](), []
    for pair in pairs:
        if pair.fold is None:
            folds.append(seen[pair.same] * FOLDS // unsaid[pair.same])
            seen[pair.same] += 1
        else:
            folds.append(pair.fold)
    return folds
