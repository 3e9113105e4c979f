"""Whether a frame is good enough to begin a clip: sharp, well lit, of enough contrast and size (ARGen eqs. 22, 25, 26).

Pure functions of pixels: knows nothing of faces.

    N frames, H W pixels
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

WEIGHTS = np.array([0.299, 0.587, 0.114])  # of red, green and blue in grey (ITU-R BT.601)


@dataclass(frozen=True)
class Quality:
    """Of N frames of one size."""

    sharpness: np.ndarray  # float64 [N], B(I), squared grey levels; 0: flat
    brightness: np.ndarray  # float64 [N], L(I), grey levels in [0, 255]
    contrast: np.ndarray  # float64 [N], C(I), grey levels in [0, 127.5]
    side: int  # pixels of the shorter side


def quality(frames: np.ndarray) -> Quality:
    """Of uint8 RGB [N, H, W, 3]; one frame after the other, for those of a film are large."""
    each = [(laplacian(grey).var(), grey.mean(), grey.std()) for grey in (greys(frame[None]) for frame in frames)]
    sharpness, brightness, contrast = np.array(each).reshape(-1, 3).T
    return Quality(sharpness, brightness, contrast, side=min(frames.shape[1:3]))


def greys(frames: np.ndarray) -> np.ndarray:
    """Whole grey levels, float64 [N, H, W], of uint8 RGB [N, H, W, 3]."""
    return np.rint(frames @ WEIGHTS)


def laplacian(grey: np.ndarray) -> np.ndarray:
    """Sum of the four neighbours less four times the pixel, [N, H, W]; beyond the edge the picture is mirrored, the
    edge itself not repeated, as OpenCV does it."""
    padded = np.pad(grey, [(0, 0), (1, 1), (1, 1)], mode="reflect" if min(grey.shape[1:]) > 1 else "edge")
    across = padded[:, 1:-1, :-2] + padded[:, 1:-1, 2:]
    down = padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1]
    return across + down - 4 * grey
