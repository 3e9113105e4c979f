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


# ---------------------------------------------------------------- clips


def noise(seed: int, frames: int, *, size: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, size, size, 3), dtype=np.uint8)


def test_the_distance_of_clips_is_over_frames_at_the_same_parts_of_both():
    real = np.zeros((1, 4, 2, 2, 3), np.uint8)
    search = NearestReal(real, ["black"])
    clip = np.zeros((8, 2, 2, 3), np.uint8)
    clip[[1, 7]] = 51  # of 8 frames, the middles of four equal parts are 1, 3, 5 and 7
    clip[[0, 2, 4, 6]] = 255
    np.testing.assert_allclose(search(clip[None])[0][1], np.sqrt((2 * 0.2**2) / 4), rtol=1e-12)


def test_one_equal_frame_is_no_near_copy_and_a_repeated_clip_is():
    real = np.stack([noise(seed, 4) for seed in range(5)])
    search = NearestReal(real, list("abcde"))
    begins = np.concatenate([real[1, :1], noise(9, 3)])
    slower = np.repeat(real[3], 4, axis=0)  # the same clip, of four times as many frames
    nudged = np.clip(real[2].astype(int) + 3, 0, 255).astype(np.uint8)
    found = [search(clip[None])[0] for clip in (begins, slower, nudged)]
    assert found[0][1] > 0.2
    assert found[1] == ("d", 0.0)
    assert found[2][0] == "c" and 0.005 < found[2][1] <= 3 / 255


def test_a_clip_that_stands_still_is_a_near_copy_of_a_real_one_that_does_hardly_more():
    face = noise(0, 1)[0].astype(int)
    calm = np.stack([np.clip(face + shift, 0, 255) for shift in (0, 1, 2, 1)]).astype(np.uint8)
    search = NearestReal(np.stack([calm, noise(1, 4)]), ["calm", "lively"])
    still = np.repeat(calm[:1], 16, axis=0)
    name, distance = search(still[None])[0]
    assert name == "calm" and distance <= 0.02
    assert search(np.repeat(noise(1, 1), 16, axis=0)[None])[0][1] > 0.02  # the lively one's first frame, standing


def test_clips_take_no_more_memory_than_images():
    search = NearestReal(np.zeros((2, 6, 128, 96, 3), np.uint8), ["a", "b"])
    assert (
        search._real.shape == (2, 4 * 32 * 32 * 3) == NearestReal(np.zeros((2, 128, 96, 3), np.uint8), "ab")._real.shape
    )
