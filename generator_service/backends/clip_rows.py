"""What every backend of clips asks of its rows, and which of them are made together. Knows nothing of models."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeVar

import numpy as np

from generator_service.backends import denoising
from generator_service.backends.interface import Row, Sampling, WeightSet
from protocol.errors import InvalidRequest, UnsupportedField

Key = TypeVar("Key", bound=Hashable)


def check(rows: Sequence[Row], weights: WeightSet, sampling: Sampling, schedulers: Sequence[str]) -> None:
    """Raises InvalidRequest when a row has no image or there is no frame to make; UnsupportedField when the sampler is
    none of these; UnknownClass."""
    denoising.check_labels(rows, weights)
    first_frames(rows)
    if sampling.frames is None or sampling.frames < 2:
        raise InvalidRequest(
            f"this backend makes clips, and {sampling.frames or 'no'} frames are none: ask for 2 or more",
            param="num_frames",
        )
    if sampling.scheduler not in schedulers:
        raise UnsupportedField(
            f"this backend makes no clips with {sampling.scheduler!r}: use one of {', '.join(schedulers)}",
            param="scheduler",
        )


def first_frames(rows: Sequence[Row]) -> list[np.ndarray]:
    """Their images, uint8 [any, any, 3] each. Raises InvalidRequest when one is missing."""
    if any(row.image is None for row in rows):
        raise InvalidRequest("a clip begins with an image: give one", param="image")
    return [row.image for row in rows]


def together(keys: Sequence[Key]) -> dict[Key, list[int]]:
    """Key -> which rows have it, both in order of the rows."""
    found: dict[Key, list[int]] = {}
    for at, key in enumerate(keys):
        found.setdefault(key, []).append(at)
    return found


def steps_of(row: Row, sampling: Sampling) -> int:
    return sampling.steps if row.steps is None else row.steps
