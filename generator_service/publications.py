"""Weight sets that a job publishes while it goes on: told by the compute thread, published by the job's own, in order.

Each set of a job is published once, also when its process died on the way and it did that part again. Knows nothing of
what is learnt.
"""

from __future__ import annotations

import logging
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from generator_service.backends.interface import Made, WeightSet
from generator_service.weights import WeightStore
from protocol.errors import Retryable

log = logging.getLogger(__name__)
PART = "part_of"  # in the metadata of a set that is not its job's result: which job's, and of which step
ATTEMPT = "attempt"  # file of the unfinished folder: tells this doing of a job from another one, across restarts


class Publications:
    """Of one job."""

    def __init__(
        self,
        weights: WeightStore,
        name: str,
        base: WeightSet,
        classes: Sequence[str],
        recipe: str,
        unfinished: Path,
        activate: Callable[[WeightSet], None] | None,
    ):
        """
        Args:
            name: of the sets. recipe: hash of all that decides what the job makes.
            unfinished: the job's folder.
            activate: what to do with each set; None: nothing.
        """
        self._weights, self._name, self._base, self._classes = weights, name, base, classes
        self._recipe, self._unfinished = recipe, unfinished
        self._activate = activate
        self._made: SimpleQueue[Made | None] = SimpleQueue()

    def add(self, made: Made) -> None:
        """To be published; returns at once. Its metadata say at which `step` it was made."""
        self._made.put(made)

    def end(self) -> None:
        """There are no more."""
        self._made.put(None)

    def published(self) -> Iterator[WeightSet]:
        """Publishes them until the end, and gives each that is new."""
        while (made := self._made.get()) is not None:
            step = made.metadata["step"]
            told = {PART: {"recipe": self._recipe, "attempt": _attempt(self._unfinished), "step": step}}
            if self._weights.find(self._name, told) is not None:
                shutil.rmtree(made.folder, ignore_errors=True)
            else:
                yield self._publish(made, {**made.metadata, **told})

    def _publish(self, made: Made, metadata: dict[str, Any]) -> WeightSet:
        weights = self._weights.publish(made.folder, self._name, self._base, made.kind, self._classes, metadata)
        if self._activate is not None:
            try:
                self._activate(weights)
            except Retryable as error:  # the next one may be luckier
                log.warning("%s are published, and not activated: %s", weights.ref, error.message)
        return weights


def is_part(weights: WeightSet) -> bool:
    """Whether its job went on after it."""
    return PART in weights.metadata


def _attempt(unfinished: Path) -> str:
    """Drawn when the first set is published."""
    path = unfinished / ATTEMPT
    if not path.exists():
        path.write_text(secrets.token_hex(8))
    return path.read_text()
