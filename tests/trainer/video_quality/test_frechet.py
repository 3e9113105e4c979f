"""The Frechet distance against high precision, against SciPy, by hand, and by what may not change it."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.video_quality.frechet import frechet_distance, moments


def drawn(n: int, d: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """Correlated features [n, d]."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return scale * torch.randn(n, d, generator=generator, dtype=torch.float64) @ mixing + shift


def precisely(generated: Tensor, real: Tensor) -> float:
    """As eq. 29 is printed, with 60 digits: the trace of the root is the sum of the roots of S_g S_t's eigenvalues."""
    with mpmath.workdps(60):

        def gaussian(features: Tensor) -> tuple[mpmath.matrix, mpmath.matrix]:
            rows = mpmath.matrix(features.tolist())
            n, d = rows.rows, rows.cols
            mean = [mpmath.fsum(rows[i, k] for i in range(n)) / n for k in range(d)]
            covariance = mpmath.matrix(d, d)
            for a in range(d):
                for b in range(d):
                    covariance[a, b] = mpmath.fsum(
                        (rows[i, a] - mean[a]) * (rows[i, b] - mean[b]) for i in range(n)
                    ) / (n - 1)
            return mpmath.matrix(mean), covariance

        (mean_g, s_g), (mean_t, s_t) = gaussian(generated), gaussian(real)
        eigenvalues = mpmath.eig(s_g * s_t, left=False, right=False)
        root = mpmath.fsum(mpmath.sqrt(abs(mpmath.re(value))) for value in eigenvalues)
        trace = mpmath.fsum(s_g[k, k] + s_t[k, k] for k in range(s_g.rows))
        shift = mpmath.fsum((mean_g[k] - mean_t[k]) ** 2 for k in range(s_g.rows))
        return float(shift + trace - 2 * root)


def by_scipy(generated: Tensor, real: Tensor) -> float:
    """The usual code: a matrix root of the product of the covariances."""
    g, t = generated.double().numpy(), real.double().numpy()
    s_g, s_t = np.cov(g, rowvar=False), np.cov(t, rowvar=False)
    root = scipy.linalg.sqrtm(s_g @ s_t).real
    return float(np.square(g.mean(0) - t.mean(0)).sum() + np.trace(s_g + s_t - 2 * root))


@pytest.mark.parametrize(("n", "m", "d"), [(9, 7, 3), (12, 12, 5), (3, 4, 6), (2, 2, 5), (2, 9, 4), (8, 2, 8)])
def test_it_is_the_printed_formula_to_the_last_digits(n: int, m: int, d: int):
    generated, real = drawn(n, d, seed=n), drawn(m, d, seed=100 + m, scale=0.5, shift=1.0)
    assert frechet_distance(generated, real) == pytest.approx(precisely(generated, real), rel=1e-11)


def test_it_is_the_usual_code_s_where_that_is_sound():
    generated, real = drawn(400, 64, seed=0), drawn(300, 64, seed=1, scale=2.0, shift=0.3)
    assert frechet_distance(generated, real) == pytest.approx(by_scipy(generated, real), rel=1e-9)


def test_gaussians_by_hand():
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)  # S = 4/3 of one
    assert frechet_distance(corners, corners + torch.tensor([3.0, 4.0])) == pytest.approx(25.0)
    assert frechet_distance(3 * corners, corners) == pytest.approx(2 * 4 / 3 * (3 - 1) ** 2)  # (s - t)^2 each axis
    flat = corners * torch.tensor([1.0, 0.0])  # singular: one axis has no spread
    assert frechet_distance(flat, corners) == pytest.approx(4 / 3)
    across = torch.tensor([[0.0, 2.0], [0.0, -2.0]], dtype=torch.float64)  # S = diag(0, 8); nothing in common with flat
    assert frechet_distance(flat, across) == pytest.approx(4 / 3 + 8)


@pytest.mark.parametrize(("n", "d"), [(2, 400), (30, 400), (400, 30), (5, 5)])
def test_a_set_is_at_distance_zero_from_itself(n: int, d: int):
    features = torch.randn(n, d, generator=torch.Generator().manual_seed(n))
    assert frechet_distance(features, features) < 1e-9
    assert frechet_distance(features, features.flip(0)) < 1e-9


def test_nearly_equal_sets_of_few_clips_keep_their_digits():
    """A matrix root of the product of singular covariances is off by about 1e-4 here, and may be complex."""
    real = torch.randn(4, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert frechet_distance(real + 1e-4, real) == pytest.approx(50 * 1e-8, rel=1e-6)


def test_moments_are_those_of_eqs_27_and_28():
    for n, d in ((40, 6), (5, 9)):
        features = drawn(n, d, seed=n)
        mean, factor = moments(features.float())
        assert factor.shape == (min(n, d), d) and factor.dtype == torch.float64
        assert mean.numpy() == pytest.approx(features.numpy().mean(0), rel=1e-5, abs=1e-6)
        assert (factor.T @ factor).numpy() == pytest.approx(np.cov(features.numpy(), rowvar=False), rel=1e-4, abs=1e-5)


sizes = st.tuples(st.integers(2, 12), st.integers(2, 12), st.integers(1, 8))


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(0, 10**6), st.floats(0.01, 100.0), st.floats(-50, 50))
def test_what_may_not_change_it(shape: tuple[int, int, int], seed: int, scale: float, shift: float):
    n, m, d = shape
    generated, real = drawn(n, d, seed), drawn(m, d, seed + 1)
    found = frechet_distance(generated, real)
    size = 1 + float(generated.square().sum() + real.square().sum())
    rotation = torch.linalg.qr(drawn(d, d, seed + 2)).Q
    assert found >= 0
    assert frechet_distance(real, generated) == pytest.approx(found, abs=1e-11 * size)
    assert frechet_distance(generated @ rotation, real @ rotation) == pytest.approx(found, abs=1e-11 * size)
    moved = size * (1 + shift**2)
    assert frechet_distance(generated + shift, real + shift) == pytest.approx(found, abs=1e-11 * moved)
    assert frechet_distance(scale * generated, scale * real) == pytest.approx(
        scale**2 * found, abs=1e-11 * size * scale**2
    )
    assert frechet_distance(generated.flip(0), real) == pytest.approx(found, abs=1e-11 * size)
