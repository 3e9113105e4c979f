"""Images and labels in batches as other people's loaders make them: a pair, or a dict of two. Knows nothing of models.

Shapes: B rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from protocol.errors import ConfigError

LABELS = ("labels", "label", "targets", "target", "y")  # keys that say which entry of a dict holds the labels


def opened(batch: Any) -> tuple[Tensor, Tensor, Callable[[Tensor, Tensor], Any]]:
    """Images [B, ...] and labels [B] of a batch, and what makes such a batch of others.

    Raises:
        ConfigError: the batch holds something else, which nothing is known of for synthetic samples.
    """
    if isinstance(batch, list | tuple) and len(batch) == 2:
        kind = type(batch)
        return batch[0], batch[1], lambda images, labels: kind((images, labels))
    if isinstance(batch, Mapping) and len(batch) == 2 and (found := [key for key in LABELS if key in batch]):
        named = found[0]
        (other,) = batch.keys() - {named}
        return batch[other], batch[named], lambda images, labels: {other: images, named: labels}
    held = sorted(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
    raise ConfigError(
        f"the loader's batches are {held}: let them be (images, labels), or a dict of these two with the labels under "
        f"one of {', '.join(LABELS)}"
    )
