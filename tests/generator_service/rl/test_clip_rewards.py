from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from generator_service import registry
from generator_service.rl import clip_rewards
from generator_service.rl.clip_rewards import Candidates, amplitude, face, measure, quality, relative, steps, total
from generator_service.rl.sampling_policy import Action
from protocol.errors import GenerationFailed, InvalidRequest
from protocol.video import GuidanceCurve

LUMA = (0.299, 0.587, 0.114)


def judged(clips: np.ndarray, presence=None, intensity=None, taken=None, longest: int = 20) -> Candidates:
    n, frames = clips.shape[:2]
    return Candidates(
        clips,
        np.ones((n, frames)) if presence is None else np.asarray(presence, dtype=np.float64),
        np.zeros((n, frames, 1)) if intensity is None else np.asarray(intensity, dtype=np.float64),
        [Action(count, GuidanceCurve()) for count in taken or [10] * n],
        longest,
    )


def noise(n: int = 1, frames: int = 3, side: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, frames, side, side, 3), dtype=np.uint8)


def grey(level: int, frames: int = 2, side: int = 16) -> np.ndarray:
    return np.full((1, frames, side, side, 3), level, dtype=np.uint8)


# ---------------------------------------------------------------- R_S, R_F, R_E


def test_steps_that_are_saved_pay():
    assert steps(judged(noise(4), taken=[5, 10, 15, 20])).tolist() == [0.75, 0.5, 0.25, 0.0]
    assert steps(judged(noise(1), taken=[3], longest=12)).tolist() == [0.75]


def test_a_face_in_each_frame_pays():
    assert face(judged(noise(2), [[1, 1, 1], [0.5, 0, 0.25]])).tolist() == [1.0, 0.25]


def test_a_weak_expression_pays():
    """Norms 0, 0.5 (3-4-5) and 2.5, held against 2: 1, 0.75 and, below nothing, 0."""
    units = [[[0, 0], [0.3, 0.4], [1.5, 2.0]]]
    assert amplitude(judged(noise(), intensity=units), maximum=2.0).tolist() == [pytest.approx(1.75 / 3)]
    assert amplitude(judged(noise(), intensity=units), maximum=0.5).tolist() == [pytest.approx(1 / 3)]


def test_or_one_that_is_as_strong_as_wanted():
    """The same norms are 1, 0.5 and 1.5 away from 1, and 0.5, 0 and 2 away from 0.5; nothing pays less than 0."""
    units = [[[0, 0], [0.3, 0.4], [1.5, 2.0]]]
    assert amplitude(judged(noise(), intensity=units), maximum=2.0, wanted=1.0).tolist() == [pytest.approx(1.5 / 3)]
    assert amplitude(judged(noise(), intensity=units), maximum=0.4, wanted=0.5).tolist() == [pytest.approx(1 / 3)]


# ---------------------------------------------------------------- R_Q


def plain_ssim(a: np.ndarray, b: np.ndarray, window: int = 7) -> float:
    """Structural similarity as its paper defines it, window by window, with sample covariances."""
    c1, c2, found = (0.01 * 255) ** 2, (0.03 * 255) ** 2, []
    for y in range(a.shape[0] - window + 1):
        for x in range(a.shape[1] - window + 1):
            p, q = (z[y : y + window, x : x + window].ravel() for z in (a, b))
            (va, cov), (_, vb) = np.cov(p, q)
            top = (2 * p.mean() * q.mean() + c1) * (2 * cov + c2)
            found.append(top / ((p.mean() ** 2 + q.mean() ** 2 + c1) * (va + vb + c2)))
    return float(np.mean(found))


def test_equal_frames_are_as_smooth_as_can_be_and_flat_ones_neither_sharp_nor_of_contrast():
    still = np.repeat(noise(frames=1), 3, axis=1)
    assert quality(judged(still), alpha=0.0).tolist() == [pytest.approx(1.0)]
    assert quality(judged(grey(90)), alpha=1.0).tolist() == [0.0]
    assert quality(judged(grey(90))).tolist() == [pytest.approx(0.4)]  # 1 - alpha


def test_frames_are_compared_with_their_neighbours_as_structural_similarity_is_defined():
    clip = noise(frames=3, side=12)
    levels = np.rint(clip[0] @ np.array(LUMA))
    wanted = (plain_ssim(levels[0], levels[1]) + plain_ssim(levels[1], levels[2])) / 2
    assert quality(judged(clip), alpha=0.0).tolist() == [pytest.approx(wanted, abs=1e-9)]
    assert abs(wanted) < 0.2  # noise is not like noise


def test_sharpness_and_contrast_of_a_checkerboard():
    """Levels of 100 and 140: deviation 20. Every pixel's four neighbours are of the other level, at the mirrored edge
    too: the Laplacian is +-160, its variance 25600."""
    board = np.where(np.indices((16, 16)).sum(0) % 2, 140, 100).astype(np.uint8)
    clip = np.repeat(board[None, None, :, :, None], 3, axis=-1)
    clip = np.repeat(clip, 2, axis=1)
    wanted = (25600 / (25600 + 100) + 20 / (20 + 32)) / 2
    assert quality(judged(clip), alpha=1.0).tolist() == [pytest.approx(wanted)]
    other = quality(judged(clip), alpha=1.0, sharpness=25600.0, contrast=20.0)
    assert other.tolist() == [pytest.approx(0.5)]
    assert quality(judged(clip)).tolist() == [pytest.approx(0.6 * wanted + 0.4)]


def test_colours_count_as_bright_as_they_are():
    green, blue = (np.zeros((1, 2, 16, 16, 3), dtype=np.uint8) for _ in range(2))
    green[..., ::2, 1] = blue[..., ::2, 2] = 255
    found = [float(quality(judged(clip), alpha=1.0, sharpness=1e12)[0]) for clip in (green, blue)]
    deviations = [round(luma * 255) / 2 for luma in LUMA[1:]]
    assert found == [pytest.approx(deviation / (deviation + 32) / 2, rel=1e-6) for deviation in deviations]


def test_blur_costs_and_so_does_flicker():
    sharp = np.repeat(noise(frames=1), 2, axis=1)
    blurred = np.full_like(sharp, int(sharp.mean()))
    blurred[..., :8, :] += 20
    flicker = noise(frames=2)
    of = [float(quality(judged(clip))[0]) for clip in (sharp, blurred, flicker)]
    assert of[0] > of[1] and of[0] > of[2]


@pytest.mark.parametrize(
    ("reward", "options"),
    [
        (quality, {"alpha": 1.1}),
        (quality, {"alpha": math.nan}),
        (quality, {"sharpness": 0.0}),
        (quality, {"contrast": -1.0}),
        (amplitude, {"maximum": 0.0}),
        (amplitude, {"wanted": -0.1}),
        (amplitude, {"wanted": float("nan")}),
    ],
)
def test_options_that_make_no_sense_are_refused(reward, options):
    with pytest.raises(InvalidRequest, match="use"):
        reward(judged(noise()), **options)


# ---------------------------------------------------------------- what holds for each of them


@pytest.mark.parametrize("name", registry.CLIP_REWARDS)
def test_every_reward_is_of_each_clip_alone(name):
    """In its order, in a batch or by itself, at most 1, and nothing is changed."""
    rng = np.random.default_rng(1)
    reward = registry.load(registry.CLIP_REWARDS, name)
    clips, taken = noise(4), [5, 20, 10, 15]
    presence, units = rng.random((4, 3)), rng.random((4, 3, 5)) * 0.3
    before = clips.copy()
    together = reward(judged(clips, presence, units, taken))
    alone = [
        float(reward(judged(clips[i : i + 1], presence[i : i + 1], units[i : i + 1], taken[i : i + 1]))[0])
        for i in range(4)
    ]
    assert together.shape == (4,) and together.tolist() == pytest.approx(alone, abs=1e-12)
    assert len(set(alone)) == 4 and max(alone) <= 1 and (clips == before).all()


# ---------------------------------------------------------------- eq. 18


def test_the_sum_is_weighted():
    components = {"steps": np.array([0.5, 0.25]), "quality": np.array([1.0, 0.5]), "face": np.array([0.1, 0.9])}
    assert total(components, {"steps": 1.0, "quality": 3.0, "face": 0.0}).tolist() == [3.5, 1.75]


def test_those_below_the_top_get_the_penalty():
    rewards = np.array([[4.0, 1.0, 3.0, 2.0], [0.1, 0.2, 0.3, 0.4]])
    assert relative(rewards, 2, 1.0).tolist() == [[4.0, -1.0, 3.0, -1.0], [-1.0, -1.0, 0.3, 0.4]]
    assert relative(rewards, 1, 0.5).tolist() == [[4.0, -0.5, -0.5, -0.5], [-0.5, -0.5, -0.5, 0.4]]
    assert relative(rewards, 4, 1.0).tolist() == rewards.tolist()


def test_equals_of_the_kth_best_are_as_good():
    assert relative(np.array([[2.0, 2.0, 2.0, 1.0]]), 2, 1.0).tolist() == [[2.0, 2.0, 2.0, -1.0]]
    assert relative(np.full((1, 4), 3.0), 2, 1.0).tolist() == [[3.0] * 4]


@given(arrays.arrays(np.float64, (3, 5), elements=st.floats(-10, 10)), st.integers(1, 5))
def test_at_least_k_keep_what_they_have_and_no_worse_one_does(rewards, top):
    kept = relative(rewards, top, 100.0) != -100.0
    assert (kept.sum(1) >= top).all()
    for row, keeps in zip(rewards, kept, strict=True):
        assert row[keeps].min() > row[~keeps].max(initial=-math.inf)
        assert (row > row[keeps].min()).sum() < top  # the k-th best is the bar


# ---------------------------------------------------------------- rewards of others


def test_what_a_reward_gives_is_checked():
    wrong = {
        "raises": (lambda candidates: 1 / 0, "'raises' raised ZeroDivisionError"),
        "nan": (lambda candidates: np.full(2, np.nan), "'nan' gave what is no finite value"),
        "short": (lambda candidates: np.ones(1), "for each of 2 clips"),
    }
    for name, (reward, told) in wrong.items():
        with pytest.raises(GenerationFailed, match=told):
            measure({name: reward}, judged(noise(2)))
    with pytest.raises(InvalidRequest):
        measure({"quality": lambda candidates: quality(candidates, alpha=2.0)}, judged(noise(2)))
    assert measure({"ones": lambda candidates: [1, 1]}, judged(noise(2)))["ones"].dtype == np.float64


def test_nothing_here_reads_a_file():
    """The module is among those that the architecture's test holds to be pure."""
    from tests.test_architecture import PURE

    assert clip_rewards.__file__.endswith(tuple(PURE))
