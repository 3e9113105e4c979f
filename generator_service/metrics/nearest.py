"""Nearest real neighbour of each synthetic sample, to find near-copies of the training data.

The distance is the root mean square difference of pixels in [0, 1]. Does not know what is done about a near-copy.

Shapes: B synthetic images, N real images, D = H*W*3 values an image.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

CHUNK = 4096  # real images compared at a time


class NearestReal:
    """Brute-force search over the real images, in memory as uint8. Safe to share between threads."""

    def __init__(self, images: np.ndarray, ids: Sequence[str]):
        """
        Args:
            images: uint8 [N, H, W, 3], N >= 1, at the size of the synthetic ones.
            ids: their N sample ids.
        """
        assert images.dtype == np.uint8 and len(images) == len(ids) > 0
        self._real = images.reshape(len(images), -1)
        self._ids = list(ids)

    def __call__(self, images: np.ndarray) -> list[tuple[str, float]]:
        """(id, distance in [0, 1]) of the nearest real image for each of uint8 [B, H, W, 3]."""
        flat = images.reshape(len(images), -1)
        queries = flat.astype(np.float32)
        best = np.full(len(flat), np.inf, dtype=np.float32)
        nearest = np.zeros(len(flat), dtype=np.int64)
        for start in range(0, len(self._real), CHUNK):
            real = self._real[start : start + CHUNK].astype(np.float32)
            # |a-b|^2 - |a|^2 = |b|^2 - 2ab, which has its minimum at the same b
            gap = np.einsum("nd,nd->n", real, real) - 2.0 * queries @ real.T
            index = gap.argmin(axis=1)
            value = gap[np.arange(len(flat)), index]
            closer = value < best
            best[closer], nearest[closer] = value[closer], start + index[closer]
        difference = (flat.astype(np.float64) - self._real[nearest]) / 255.0  # exact, where the products above round
        distance = np.sqrt(np.mean(difference**2, axis=1))
        return [(self._ids[i], float(d)) for i, d in zip(nearest, distance, strict=True)]
