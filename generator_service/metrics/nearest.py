"""Nearest real neighbour of each synthetic sample, to find near-copies of the training data.

The distance is the root mean square difference of pixels in [0, 1]. Of clips it is taken over a few frames at the same
parts of both (`real_images.small`). One that begins with a real clip's frame and goes its own way is no near-copy for
that; a clip that repeats a real one is, and so is one that stands still, of a real clip that does hardly more. Does not
know what is done about a near-copy.

Shapes: B synthetic samples, N real ones, D values of a sample as it is compared.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from generator_service.real_images import Pictures, small

CHUNK_BYTES = 2**28  # of real images compared at a time, as float32


class NearestReal:
    """Brute-force search over the real images or clips, in memory as uint8. Safe to share between threads."""

    def __init__(self, images: np.ndarray | Pictures, ids: Sequence[str]):
        """
        Args:
            images: uint8 [N, H, W, 3], N >= 1, at the size of the synthetic ones; large ones are compared small. Of
                clips [N, F, H, W, 3], where F need not be the length of the synthetic ones.
            ids: their N sample ids.
        """
        assert len(images) == len(ids) > 0
        self._real = small(images).reshape(len(images), -1)
        self._ids = list(ids)
        self._chunk = max(1, CHUNK_BYTES // (4 * self._real.shape[1]))  # images

    def __call__(self, images: np.ndarray) -> list[tuple[str, float]]:
        """(id, distance in [0, 1]) of the nearest real image for each of uint8 [B, H, W, 3], or the nearest real clip
        for each of [B, M, H, W, 3]."""
        flat = small(images).reshape(len(images), -1)
        queries = flat.astype(np.float32)
        best = np.full(len(flat), np.inf, dtype=np.float32)
        nearest = np.zeros(len(flat), dtype=np.int64)
        for start in range(0, len(self._real), self._chunk):
            real = self._real[start : start + self._chunk].astype(np.float32)
            # |a-b|^2 - |a|^2 = |b|^2 - 2ab, which has its minimum at the same b
            gap = np.einsum("nd,nd->n", real, real) - 2.0 * queries @ real.T
            index = gap.argmin(axis=1)
            value = gap[np.arange(len(flat)), index]
            closer = value < best
            best[closer], nearest[closer] = value[closer], start + index[closer]
        difference = (flat.astype(np.float64) - self._real[nearest]) / 255.0  # exact, where the products above round
        distance = np.sqrt(np.mean(difference**2, axis=1))
        return [(self._ids[i], float(d)) for i, d in zip(nearest, distance, strict=True)]
