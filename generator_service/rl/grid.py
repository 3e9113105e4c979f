"""A picture of a rollout: a row an identity, small samples side by side. Knows nothing of what they are good for."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

IDENTITIES, SAMPLES = 8, 8  # shown at most
SIDE = 64  # pixels of a sample, at most


def grid(images: np.ndarray, labels: np.ndarray) -> str:
    """PNG, base64, of the first samples of the first identities.

    Args:
        images: uint8 [n, H, W, 3]. labels: int64 [n], in the order of the rows that they are to be shown in.
    """
    _, first = np.unique(labels, return_index=True)
    shown = [labels[at] for at in sorted(first)][:IDENTITIES]
    height, width = _fitted(*images.shape[1:3])
    sheet = Image.new("RGB", (width * SAMPLES, height * len(shown)))
    for row, label in enumerate(shown):
        for column, image in enumerate(images[labels == label][:SAMPLES]):
            small = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
            sheet.paste(small, (column * width, row * height))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _fitted(height: int, width: int) -> tuple[int, int]:
    """The size of a sample in the picture: no side is longer than `SIDE`."""
    scale = min(1.0, SIDE / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))
