from __future__ import annotations

import numpy as np

from generator_service.metrics import nearest
from generator_service.metrics.nearest import NearestReal


def test_distances_are_root_mean_square_differences_in_unit_range():
    black, white = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 255, np.uint8)
    search = NearestReal(np.stack([black, white]), ["black", "white"])
    grey = np.full((2, 2, 3), 51, np.uint8)  # 0.2 from black, 0.8 from white
    one_pixel = black.copy()
    one_pixel[0, 0, 0] = 255  # one of twelve values differs by 1
    found = search(np.stack([grey, one_pixel, white]))
    assert [name for name, _ in found] == ["black", "black", "white"]
    np.testing.assert_allclose([distance for _, distance in found], [0.2, np.sqrt(1 / 12), 0.0], rtol=1e-12)


def test_the_search_agrees_with_comparing_all_pairs_across_chunks(monkeypatch):
    monkeypatch.setattr(nearest, "CHUNK_BYTES", 7 * 4 * 8 * 8 * 3)  # seven images
    rng = np.random.default_rng(0)
    real = rng.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    synthetic = np.concatenate([rng.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8), real[[3, 39]]])
    pairs = (synthetic[:, None].astype(float) - real[None].astype(float)) / 255
    distances = np.sqrt((pairs**2).mean(axis=(2, 3, 4)))
    found = NearestReal(real, [str(n) for n in range(40)])(synthetic)
    assert [int(name) for name, _ in found] == distances.argmin(axis=1).tolist()
    np.testing.assert_allclose([distance for _, distance in found], distances.min(axis=1), rtol=1e-12)
    assert found[-1] == ("39", 0.0)
