"""Captions for every picture of a dataset that has none, written to its metadata while they are made.

A run that was interrupted goes on where it was, since what has a caption is left alone. Knows nothing of the model.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from protocol.dataset import Dataset, DatasetConfig, Entry
from protocol.dataset_captions import add_captions
from protocol.errors import BadFile, DatasetError

log = logging.getLogger(__name__)

SAVE_S = 30.0  # at most so much work is lost when the process is killed

Describe = Callable[[Sequence[np.ndarray]], list[str]]
"""A caption for each picture, uint8 RGB [H, W, 3]; "" for none."""


@dataclass
class Captioned:
    """What became of the pictures."""

    had: int = 0  # a caption before
    written: int = 0
    silent: int = 0  # the model said nothing
    bad: int = 0  # no pictures, or not readable any more

    def __str__(self) -> str:
        told = f"{self.written} captions written, {self.had} pictures had one"
        told += f", {self.silent} got none from the model" if self.silent else ""
        return told + (f", {self.bad} files are bad and were skipped" if self.bad else "")


def caption(
    dataset: Dataset,
    place: DatasetConfig,
    describe: Describe,
    batch_size: int,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> Captioned:
    """Describe the pictures without a caption, and write what was said, also when this is interrupted.

    Args:
        place: where the dataset was opened.
        batch_size: pictures given to `describe` at a time.
        on_batch: called with pictures done, and pictures in all.

    Raises:
        DatasetError: the dataset is of clips. DatasetError, DiskFull: as `add_captions`.
    """
    if dataset.is_clips:
        raise DatasetError(
            f"{place.root} holds clips, and captions are of pictures: leave clips without, their prompts are composed "
            "from action units"
        )
    todo = [entry for entry in dataset.samples if not (entry.caption or "").strip()]
    report = Captioned(had=len(dataset) - len(todo), bad=len(dataset.bad_files))
    unsaved: dict[str, str] = {}
    saved = time.monotonic()
    try:
        for done, entries, images in _batches(dataset, todo, batch_size, place.threads):
            said = {e.relative: text for e, text in zip(entries, describe(images), strict=True) if text.strip()}
            report.silent += len(entries) - len(said)
            report.bad += min(batch_size, len(todo) - done) - len(entries)
            unsaved |= said
            if time.monotonic() - saved >= SAVE_S:
                report.written += add_captions(place.root, place.split, unsaved)
                unsaved, saved = {}, time.monotonic()
            on_batch(min(done + batch_size, len(todo)), len(todo))
    finally:
        report.written += add_captions(place.root, place.split, unsaved)
    return report


def _batches(
    dataset: Dataset, todo: Sequence[Entry], size: int, threads: int
) -> Iterator[tuple[int, list[Entry], list[np.ndarray]]]:
    """Index of the first, entries and pictures of each batch; what cannot be read is left out and told."""

    def read(entry: Entry) -> np.ndarray | None:
        try:
            return dataset.image(entry.id)
        except BadFile as error:
            log.warning("skipped %s: %s", entry.path, error.message)
            return None

    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(todo), size):
            part = todo[start : start + size]
            read_ones = zip(part, pool.map(read, part), strict=True)
            pictures = [(entry, image) for entry, image in read_ones if image is not None]
            yield start, [entry for entry, _ in pictures], [image for _, image in pictures]
