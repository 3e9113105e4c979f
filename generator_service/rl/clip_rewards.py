"""What a clip is rewarded for (ARGen 3.3, eqs. 14-18): few steps, quality, a face in every frame, and an expression
that is not exaggerated; and how the candidates of one state are held against each other.

Pure functions. A reward is a function of `Candidates`, with float options by keyword, to float64 [n]; others' rewards
are such functions too, named in the table [generator.clip_rewards]. Knows nothing of how clips are made, nor of who
found faces in them.

The top k (Algorithm 1, line 8): the algorithm's "R(u) < top-k in D_val" holds a candidate against validation data, and
the text against the other candidates of its state ("only candidates scoring higher than the top k receive rewards").
It is done as the text says: what validation shows is never learnt from. A candidate as good as the k-th best counts
among the best: of equal ones none is worse, and a policy that is sure draws one action again and again.

    n clips, M frames of each, H W pixels, K action units, B states, C candidates of each
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from skimage.metrics import structural_similarity

from generator_service.faces import gates
from generator_service.rl.sampling_policy import Action
from protocol.errors import GenerationFailed, InvalidRequest, OnTheFlyError

WINDOW = 7  # pixels a side that structural similarity compares


@dataclass(frozen=True)
class Candidates:
    """Clips that were made, how, and what a face reader says of them."""

    clips: np.ndarray  # uint8 [n, M, H, W, 3]
    presence: np.ndarray  # float64 [n, M] in [0, 1]: p_m, how sure it is that there is a face
    intensity: np.ndarray  # float64 [n, M, K] in [0, 1]: a_m; 0 where there is no face
    actions: Sequence[Action]  # n: what each was made with
    longest: int  # S_Tmax: the most steps that there are to choose from

    def __post_init__(self) -> None:
        n, frames = self.clips.shape[:2]
        assert self.clips.dtype == np.uint8 and self.clips.ndim == 5 and len(self.actions) == n
        assert self.presence.shape == (n, frames) and self.intensity.shape[:2] == (n, frames)


ClipReward = Callable[[Candidates], np.ndarray]  # its options are bound already; [n]


# ---------------------------------------------------------------- the four rewards


def steps(candidates: Candidates) -> np.ndarray:
    """R_S, eq. 14: the part of the longest sampling that is saved, 1 - T / T_max: [n] in [0, 1)."""
    return 1 - np.array([action.steps for action in candidates.actions]) / candidates.longest


def quality(
    candidates: Candidates, *, alpha: float = 0.6, sharpness: float = 100.0, contrast: float = 32.0
) -> np.ndarray:
    """R_Q, eq. 15: alpha Q_m + (1 - alpha) Q_M: [n], at most 1.

    Q_m is of each frame, Q_M of its neighbours. The paper does not print them; here

        Q_m = mean over frames of (s / (s + sharpness) + c / (c + contrast)) / 2
        Q_M = mean over neighbouring frames of their structural similarity

    with s the variance of the Laplacian (eq. 22) and c the standard deviation (eq. 26) of a frame's grey levels, 0 to
    255. Both saturate, so that neither noise nor hard edges pay without end.

    Args:
        alpha: in [0, 1]. sharpness, contrast: s and c that count half, above 0.

    Raises InvalidRequest on other options.
    """
    if not 0 <= alpha <= 1 or sharpness <= 0 or contrast <= 0:
        raise InvalidRequest(
            "quality: use an alpha from 0 to 1, and a sharpness and a contrast above 0", param="rewards.quality.options"
        )
    n, frames = candidates.clips.shape[:2]
    every = candidates.clips.reshape(n * frames, *candidates.clips.shape[2:])
    found, grey = gates.quality(every), gates.greys(every)
    of_frames = _saturating(found.sharpness, sharpness) / 2 + _saturating(found.contrast, contrast) / 2
    smooth = [_smoothness(clip) for clip in grey.reshape(n, frames, *grey.shape[1:])]
    return alpha * of_frames.reshape(n, frames).mean(1) + (1 - alpha) * np.array(smooth)


def face(candidates: Candidates) -> np.ndarray:
    """R_F, eq. 16: how far there is a face in each frame, on average: [n] in [0, 1]."""
    return candidates.presence.mean(1)


def amplitude(candidates: Candidates, *, maximum: float = 1.5, wanted: float = 0.0) -> np.ndarray:
    """R_E, eq. 17: the mean over frames of max(0, 1 - | |a_m| - wanted | / a_max): [n] in [0, 1].

    Wanted 0 is as printed: the weaker the expression, the more it pays, and none at all, or no face, pays most. Where
    the other rewards do not ask for an expression either, say how strong one is wanted; with a maximum that is no more
    than that, none at all, or no face, pays nothing.

    Args:
        maximum: a_max, above 0, in intensities from 0 to 1; the default, which the paper does not tell, is that of
            five action units at two thirds.
        wanted: |a_m| that pays most, at least 0.

    Raises InvalidRequest on other options.
    """
    if not 0 < maximum < math.inf or not 0 <= wanted < math.inf:
        raise InvalidRequest(
            "amplitude: use a maximum above 0, and a wanted amplitude of 0 or more", param="rewards.amplitude.options"
        )
    away = np.abs(np.linalg.norm(candidates.intensity, axis=2) - wanted)
    return np.maximum(0, 1 - away / maximum).mean(1)


def _saturating(values: np.ndarray, half: float) -> np.ndarray:
    """In [0, 1): 1/2 at `half`."""
    return values / (values + half)


def _smoothness(clip: np.ndarray) -> float:
    """Mean structural similarity of neighbouring frames [M, H, W]."""
    return float(np.mean([structural_similarity(a, b, win_size=WINDOW, data_range=255) for a, b in pairwise(clip)]))


# ---------------------------------------------------------------- all of them together


def measure(rewards: Mapping[str, ClipReward], candidates: Candidates) -> dict[str, np.ndarray]:
    """Each reward of each clip, float64 [n].

    Raises GenerationFailed when a reward raises, or gives what is no finite [n]; it names the reward. Errors of the
    tree, such as InvalidRequest, pass as they are.
    """
    return {name: _measured(name, reward, candidates) for name, reward in rewards.items()}


def _measured(name: str, reward: ClipReward, candidates: Candidates) -> np.ndarray:
    try:
        values = np.asarray(reward(candidates), dtype=np.float64)
    except OnTheFlyError:
        raise
    except Exception as error:
        raise GenerationFailed(f"reward {name!r} raised {type(error).__name__}: {error}") from error
    if values.shape != (len(candidates.clips),) or not np.isfinite(values).all():
        raise GenerationFailed(
            f"reward {name!r} gave what is no finite value for each of {len(candidates.clips)} clips: correct it, or "
            "leave it out"
        )
    return values


def total(components: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """R(u) of eq. 18, before any penalty: the sum of components times weights, [n]."""
    return sum(weight * components[name] for name, weight in weights.items())


def relative(rewards: np.ndarray, top: int, penalty: float) -> np.ndarray:
    """Eq. 18: of the candidates of each state [B, C], those below the `top`-th best get -gamma, the others keep what
    they have. See the module's docstring."""
    assert 1 <= top <= rewards.shape[1], (top, rewards.shape)
    bar = np.sort(rewards, axis=1)[:, -top, None]
    return np.where(rewards >= bar, rewards, -penalty)
