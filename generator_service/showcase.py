"""A few samples of each work unit, small, for operators to see. Knows nothing of who looks."""

from __future__ import annotations

import base64
import logging

import numpy as np
from PIL import Image

from protocol.bus_board import Board
from protocol.codec import image_to_bytes
from protocol.entries import SampleBatch
from protocol.errors import Retryable
from protocol.operations import ShownSample

log = logging.getLogger(__name__)

THUMBNAIL = 96  # pixels, of the longer side
SOURCES = 8  # of a feedback, from the first: the hardest
EACH = 3  # samples of a source


def thumbnail(image: np.ndarray) -> bytes:
    """PNG of uint8 [H, W, 3], made smaller where it is larger than `THUMBNAIL`."""
    picture = Image.fromarray(image)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return image_to_bytes(np.asarray(picture))


def show(board: Board, batch: SampleBatch, images: np.ndarray) -> None:
    """Put some samples of a published batch on the board; without effect while the broker has no room, or is away.

    Args:
        images: uint8 [samples, H, W, 3].
    """
    sources = list(dict.fromkeys(sample.source_id for sample in batch.samples))
    before = batch.unit * len(sources)  # sources of earlier units, which are as large
    shown = sources[: max(0, SOURCES - before)]
    chosen = [
        ShownSample(sample=sample, thumbnail=base64.b64encode(thumbnail(image)).decode("ascii"))
        for sample, image in zip(batch.samples, images, strict=True)
        if sample.source_id in shown and sample.index < EACH
    ]
    if not chosen:
        return
    try:
        board.show(batch.run, chosen)
    except Retryable as error:
        log.debug("samples of unit %s are not shown: %s", batch.unit_id, error.message)
