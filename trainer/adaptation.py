"""What it took to adapt the weights that a run's samples were made with, as far as the service says.

Knows nothing of how weights are adapted.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from protocol.client import GeneratorClient
from protocol.errors import Retryable
from protocol.messages import WeightsRef
from trainer.metrics.device_hours import write_adaptation

log = logging.getLogger("trainer")


def note(client: GeneratorClient, used: Iterable[WeightsRef], folder: Path) -> None:
    """Keep the seconds that adapting took in the run's folder, of those of its weights whose metadata tell them.

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
    told = {str(weights): weights.metadata["seconds"] for weights in listed if "seconds" in weights.metadata}
    write_adaptation(folder, {name: seconds for name, seconds in told.items() if name in wanted})
