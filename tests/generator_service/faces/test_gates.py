"""Gates by hand: Laplacian variance, brightness and contrast of tiny pictures (eqs. 22, 25, 26)."""

from __future__ import annotations

import numpy as np
import pytest

from generator_service.faces.gates import greys, laplacian, quality


def grey(values: list[list[int]]) -> np.ndarray:
    """uint8 [1, H, W, 3] of grey levels."""
    return np.repeat(np.array(values, dtype=np.uint8)[None, :, :, None], 3, axis=3)


def test_grey_weighs_the_colours_and_is_whole():
    frames = np.array([[[[255, 0, 0], [0, 255, 0], [0, 0, 255], [10, 20, 30]]]], dtype=np.uint8)
    assert greys(frames).tolist() == [[[76.0, 150.0, 29.0, 18.0]]]  # 76.245, 149.685, 29.07, 18.15


def test_the_laplacian_mirrors_beyond_the_edge():
    found = laplacian(np.array([[[0.0, 10.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 40.0]]]))
    # left of a first pixel stands its right neighbour, and so on
    assert found.tolist() == [[[20.0, -40.0, 20.0], [0.0, 10.0, 40.0], [0.0, 40.0, -160.0]]]


def test_sharpness_is_the_laplacians_variance():
    # 3 x 3 with 90 in the middle: edges' middles 180 (90 from the middle, 90 from its mirror), the middle -360
    found = quality(grey([[0, 0, 0], [0, 90, 0], [0, 0, 0]]))
    values = np.array([0, 180, 0, 180, -360, 180, 0, 180, 0])
    assert laplacian(greys(grey([[0, 0, 0], [0, 90, 0], [0, 0, 0]])))[0].tolist() == values.reshape(3, 3).tolist()
    assert found.sharpness == pytest.approx([(4 * 180**2 + 360**2) / 9 - 40.0**2])  # mean (4 * 180 - 360) / 9 = 40
    assert found.brightness == pytest.approx([10.0])
    assert found.contrast == pytest.approx([np.sqrt(90**2 / 9 - 100)])
    assert found.side == 3


def test_each_frame_is_measured_alone():
    flat, checks = np.full((1, 8, 6, 3), 100, dtype=np.uint8), np.indices((8, 6)).sum(0) % 2 * 200
    both = np.concatenate([flat, np.repeat(checks.astype(np.uint8)[None, :, :, None], 3, axis=3)])
    found = quality(both)
    assert (found.sharpness[0], found.contrast[0], found.side) == (0.0, 0.0, 6)
    assert found.sharpness[1] == pytest.approx(800.0**2)  # +-800 everywhere
    assert found.contrast[1] == pytest.approx(100.0)
