"""Guidance of each frame of a clip (ARGen eq. 12). Pure numbers; knows nothing of models, nor of who chose the curve.

Shapes: M frames.
"""

from __future__ import annotations

import numpy as np

from protocol.video import GuidanceCurve


def frame_guidance(curve: GuidanceCurve, frames: int) -> np.ndarray:
    """f(m; a, b) = g_min + (g_max - g_min) (m/M)^(a-1) (1 - m/M)^(b-1) of frames m = 1..M: float64 [M].

    With `peak_normalised` the product is divided by its largest value on [0, 1], which is at (a-1)/(a+b-2).
    """
    rise, fall, at = curve.a - 1, curve.b - 1, np.arange(1, frames + 1) / frames
    shape = at**rise * (1 - at) ** fall
    if curve.peak_normalised and rise + fall > 0:
        shape = shape / ((rise / (rise + fall)) ** rise * (fall / (rise + fall)) ** fall)
    return curve.minimum + (curve.maximum - curve.minimum) * shape
