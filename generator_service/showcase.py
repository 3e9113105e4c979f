"""A few samples of each work unit, small, for operators to see. Knows nothing of who looks."""

from __future__ import annotations

import base64
import io
import logging

import numpy as np
from PIL import Image

from protocol.bus_board import Board
from protocol.clips import spread
from protocol.codec import image_to_bytes
from protocol.entries import Sample, SampleBatch
from protocol.errors import Retryable
from protocol.operations import ShownSample

log = logging.getLogger(__name__)

THUMBNAIL = 96  # pixels, of the longer side
SOURCES = 8  # of a feedback, from the first: the hardest
EACH = 3  # samples of a source
FRAMES = 8  # of a clip, at most, evenly spread
QUALITY = 70  # of those, 0 to 100
FPS = 8.0  # of a clip that tells no other


def thumbnail(image: np.ndarray) -> bytes:
    """PNG of uint8 [H, W, 3], made smaller where it is larger than `THUMBNAIL`."""
    picture = Image.fromarray(image)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return image_to_bytes(np.asarray(picture))


def moving_thumbnail(clip: np.ndarray, fps: float) -> bytes:
    """Animated WebP of a few frames of uint8 [M, H, W, 3], as small as `thumbnail`, which lasts as long as the clip."""
    chosen = spread(len(clip), min(FRAMES, len(clip)))
    first, *others = (Image.fromarray(clip[index]) for index in chosen)
    for picture in (first, *others):
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
    out, duration_ms = io.BytesIO(), round(1000 * len(clip) / fps / len(chosen))
    first.save(out, "WEBP", save_all=True, append_images=others, duration=duration_ms, loop=0, quality=QUALITY)
    return out.getvalue()


def show(board: Board, batch: SampleBatch, images: np.ndarray) -> None:
    """Put some samples of a published batch on the board; without effect while the broker has no room, or is away.

    Args:
        images: uint8 [samples, H, W, 3], of clips [samples, M, H, W, 3].
    """
    sources = list(dict.fromkeys(sample.source_id for sample in batch.samples))
    before = batch.unit * len(sources)  # sources of earlier units, which are as large
    shown = sources[: max(0, SOURCES - before)]
    chosen = [
        _shown(sample, image)
        for sample, image in zip(batch.samples, images, strict=True)
        if sample.source_id in shown and sample.index < EACH
    ]
    if not chosen:
        return
    try:
        board.show(batch.run, chosen)
    except Retryable as error:
        log.debug("samples of unit %s are not shown: %s", batch.unit_id, error.message)


def _shown(sample: Sample, image: np.ndarray) -> ShownSample:
    """`image`: uint8 [H, W, 3], or a clip [M, H, W, 3]."""
    moves = image.ndim == 4
    picture = moving_thumbnail(image, sample.fps or FPS) if moves else thumbnail(image)
    media_type = "image/webp" if moves else "image/png"
    return ShownSample(sample=sample, thumbnail=base64.b64encode(picture).decode("ascii"), media_type=media_type)
