"""Queries and the gallery to search for them: two splits of one dataset that number identities and cameras alike.

Knows nothing of models, nor of how a ranking is scored.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from protocol.dataset import Dataset, DatasetConfig
from protocol.dataset_identity import DISTRACTOR
from protocol.dataset_layout import in_boxes, list_split, split_folder
from protocol.errors import DatasetError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RetrievalSet:
    """N pictures; a number means the same in the queries and in the gallery."""

    dataset: Dataset  # its labels are of this split alone
    identities: Tensor  # int64 [N]; -1: a distractor, which shows nobody that is asked for
    cameras: Tensor  # int64 [N]; -1: no picture is passed over for its camera


def open_retrieval(
    config: DatasetConfig, query: str, gallery: str, *, camera_exclusion: bool = True
) -> tuple[RetrievalSet, RetrievalSet]:
    """The queries and the gallery of a dataset.

    Args:
        config: of the dataset. Its own split, where it names one, is what is learnt; what it says of classes and of how
            many are learnt is not about these.
        query, gallery: splits. Of Market-1501 and CUHK03-NP "query" and "gallery"; of others any folder's name.
        camera_exclusion: pictures of the query's identity by the query's own camera are to be passed over, as the
            protocol of Market-1501 has it. False: cameras are all -1.

    Raises:
        BadFile, DatasetError: as `Dataset.open`; a picture has no camera; no query has a match in the gallery; an
            identity of Market-1501 or CUHK03-NP is both learnt and tested.
    """
    if query == gallery and not camera_exclusion:
        raise DatasetError(
            f"queries and gallery are both {query!r}: every query would find itself. Name two splits, or let pictures "
            "by the query's own camera be passed over"
        )
    opened = [Dataset.open_identities(config.model_copy(update={"split": split})) for split in (query, gallery)]
    if camera_exclusion:
        for dataset in opened:
            _check_cameras(dataset)
    nobody = {DISTRACTOR} if in_boxes(config.root, config.layout) else set()
    people = {name: number for number, name in enumerate(sorted({*opened[0].classes, *opened[1].classes} - nobody))}
    names = sorted({str(entry.camera) for dataset in opened for entry in dataset.samples if camera_exclusion})
    views = {name: number for number, name in enumerate(names)}
    queries, found = (_numbered(dataset, people, views) for dataset in opened)
    _check_matches(queries, found, query, gallery)
    _check_learnt(config, {query, gallery}, people)
    return queries, found


def _check_cameras(dataset: Dataset) -> None:
    without = [entry for entry in dataset.samples if entry.camera is None]
    if without:
        raise DatasetError(
            f"{without[0].path} has no camera, nor have {len(without) - 1} of the {len(dataset)} pictures beside it: "
            "write `camera` (a name or an int) on each line of metadata.jsonl, or set camera_exclusion = false"
        )


def _numbered(dataset: Dataset, people: dict[str, int], views: dict[str, int]) -> RetrievalSet:
    identities = torch.tensor([people.get(entry.class_name, -1) for entry in dataset.samples], dtype=torch.long)
    cameras = torch.tensor([views.get(str(entry.camera), -1) for entry in dataset.samples], dtype=torch.long)
    return RetrievalSet(dataset, identities, cameras)


def _check_matches(queries: RetrievalSet, gallery: RetrievalSet, query: str, name: str) -> None:
    """Raises DatasetError when no query can be answered; tells of those that cannot."""
    seen: dict[int, set[int]] = {}  # identity -> the cameras that took it
    for identity, camera in zip(gallery.identities.tolist(), gallery.cameras.tolist(), strict=True):
        seen.setdefault(identity, set()).add(camera)
    asked = zip(queries.identities.tolist(), queries.cameras.tolist(), strict=True)
    unanswered = [row for row, (who, by) in enumerate(asked) if not seen.get(who, set()) - ({by} if by >= 0 else set())]
    if len(unanswered) == len(queries.dataset):
        excluded = " by another camera" if (queries.cameras >= 0).all() else ""
        raise DatasetError(
            f"no picture of {query!r} has one of the same identity{excluded} in {name!r}: name the splits that belong "
            "together, or check the identities and cameras"
        )
    if unanswered:
        log.warning(
            "%d of %d queries have no match in %r and do not count, such as %s",
            len(unanswered),
            len(queries.dataset),
            name,
            queries.dataset.samples[unanswered[0]].relative,
        )


def _check_learnt(config: DatasetConfig, searched: set[str], people: dict[str, int]) -> None:
    """Raises DatasetError, or tells, when identities that are tested are learnt as well."""
    if config.split is None or config.split in searched:
        return
    if not split_folder(config.root, config.split, config.layout).is_dir():
        return
    both = sorted(people.keys() & {str(item.label) for item in list_split(config.root, config.split, config.layout)})
    if both and in_boxes(config.root, config.layout):
        raise DatasetError(
            f"{len(both)} identities are both in {config.split!r} and in the splits to test on, such as {both[0]}: "
            "the test would be on people who were learnt. Remove them from one of the two"
        )
    if both:
        log.warning("%d of %d identities to test on are learnt as well, such as %s", len(both), len(people), both[0])
