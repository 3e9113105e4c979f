"""What it took to make the weights that a run's samples were made with, as far as the service says: adapting, and
tuning what came of it.

Knows nothing of how weights are made.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from protocol.client import GeneratorClient
from protocol.errors import Retryable
from protocol.messages import WeightsInfo, WeightsRef
from trainer.metrics.device_hours import write_adaptation

log = logging.getLogger("trainer")

PART = "part_of"  # in the metadata of a set that its job published on its way


def note(client: GeneratorClient, used: Iterable[WeightsRef], folder: Path) -> None:
    """Keep in the run's folder the seconds that it took to make its weights, of those whose metadata tell them.

    Raises:
        DiskFull.
    """
    wanted = {str(weights) for weights in used}
    if not wanted:
        return
    try:
        listed = client.weights().data
    except Retryable as error:
        log.info("what the adaptation of the weights took is not known: %s", error)
        return
    write_adaptation(folder, took(wanted, {str(weights): weights for weights in listed}))


def took(used: Iterable[str], known: Mapping[str, WeightsInfo]) -> dict[str, float]:
    """Seconds of these sets and of all that they were made from, each once: a set's metadata count from the beginning
    of its job, of which it has only what came after the set that the job published before it.

    Args:
        used: "name@version". known: by the same.
    """
    found: dict[str, float] = {}
    seen, waiting = set[str](), list(used)
    while waiting:
        name = waiting.pop()
        if name in seen or name not in known:
            continue
        seen.add(name)
        weights, before = known[name], _published_before(known[name], known)
        if "seconds" in weights.metadata:
            earlier = before.metadata.get("seconds", 0.0) if before else 0.0
            found[name] = max(0.0, weights.metadata["seconds"] - earlier)
        waiting += [str(one) for one in (before, weights.base) if one is not None]
    return found


def _published_before(weights: WeightsInfo, known: Mapping[str, WeightsInfo]) -> WeightsInfo | None:
    """The last set that the same job had published on its way."""
    recipe = _recipe(weights)
    for version in range(weights.version - 1, 0, -1):
        other = known.get(f"{weights.name}@{version}")
        if other is not None and recipe is not None and _recipe(other) == recipe:
            return other if PART in other.metadata else None  # else the result of an earlier job like it
    return None


def _recipe(weights: WeightsInfo) -> str | None:
    """What identifies the job."""
    return weights.metadata.get(PART, weights.metadata).get("recipe")
