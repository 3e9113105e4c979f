"""DOSNES: its matrix by its definition, its gradient by finite differences, and clusters that stay clusters."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.report import dosnes


@pytest.fixture
def features() -> np.ndarray:
    """Four clusters of 15 samples in 8 dimensions, far from each other."""
    draw = np.random.default_rng(0)
    centres = 6 * np.eye(4, 8)
    return np.concatenate([centre + draw.normal(size=(15, 8)) for centre in centres])


def test_every_sample_has_as_many_neighbours(features: np.ndarray):
    squares = ((features[:, None] - features[None]) ** 2).sum(-1)
    np.fill_diagonal(squares, np.inf)
    conditional = np.zeros_like(squares)
    for row, own in enumerate(squares - squares.min(1, keepdims=True)):  # a plain search for each row's precision
        low, high = 1e-6, 1e3
        for _ in range(80):
            middle = (low * high) ** 0.5
            p = np.exp(-middle * own)
            p /= p.sum()
            entropy = -(p[p > 0] * np.log(p[p > 0])).sum()
            low, high = (middle, high) if entropy > np.log(7.0) else (low, middle)
        assert np.exp(entropy) == pytest.approx(7.0, rel=1e-6)
        conditional[row] = p
    assert dosnes.affinities(features, 7.0) == pytest.approx((conditional + conditional.T) / 2, abs=1e-9)


def test_rows_and_columns_sum_to_one(features: np.ndarray):
    skewed = np.random.default_rng(1).random((30, 30)) ** 4
    for matrix in (dosnes.affinities(features, 7.0), skewed + skewed.T):
        found = dosnes.doubly_stochastic(matrix)
        assert np.abs(found.sum(0) - 1).max() < 1e-6
        assert np.abs(found.sum(1) - 1).max() < 1e-6
        assert np.allclose(found, found.T, atol=1e-15)
    by_diagonal = np.sqrt(found.diagonal() / matrix.diagonal())  # it is D M D, and the diagonal tells D
    assert np.allclose(by_diagonal[:, None] * matrix * by_diagonal, found)


def test_a_two_by_two_matrix_by_hand():
    # D M D with d1 d1 a + d1 d2 b = 1 and d1 d2 b + d2 d2 c = 1: for a = 4, b = 1, c = 4 both d are sqrt(1 / 5)
    assert dosnes.doubly_stochastic(np.array([[4.0, 1.0], [1.0, 4.0]])) == pytest.approx(
        np.array([[0.8, 0.2], [0.2, 0.8]])
    )


def test_the_gradient_is_that_of_finite_differences(features: np.ndarray):
    p = dosnes.doubly_stochastic(dosnes.affinities(features[::4], 3.0) + 1e-12) / len(features[::4])
    y, step = np.random.default_rng(2).normal(size=(len(p), 3)), 1e-5
    found = dosnes.gradient(p, y)
    for row, column in ((0, 0), (3, 1), (7, 2), (14, 0)):
        moved = np.zeros_like(y)
        moved[row, column] = step
        slope = (dosnes.cost(p, y + moved) - dosnes.cost(p, y - moved)) / (2 * step)
        assert found[row, column] == pytest.approx(slope, rel=1e-5, abs=1e-9)


def test_clusters_lie_apart_on_the_sphere(features: np.ndarray):
    components = np.linalg.svd(features - features.mean(0))[0][:, :8] * np.linalg.svd(features - features.mean(0))[1]
    places = dosnes.embed(components, 10.0)
    assert np.array_equal(places, dosnes.embed(components, 10.0))
    assert np.linalg.norm(places, axis=1) == pytest.approx(1.0)
    labels = np.arange(60) // 15
    apart = ((places[:, None] - places[None]) ** 2).sum(-1) + 9 * np.eye(60)
    assert (labels[apart.argmin(1)] == labels).all()
    centres = np.stack([places[labels == label].mean(0) for label in range(4)])
    assert np.linalg.norm(centres.mean(0)) < 0.3  # all around the globe, not on one side of it


def test_the_map_keeps_areas_and_stays_in_its_ellipse():
    draw = np.random.default_rng(3)
    places = draw.normal(size=(20_000, 3))
    places /= np.linalg.norm(places, axis=1, keepdims=True)
    found = dosnes.hammer(places)
    assert ((found[:, 0] / 8**0.5) ** 2 + (found[:, 1] / 2**0.5) ** 2).max() <= 1 + 1e-9
    inner = (found[:, 0] / 8**0.5) ** 2 + (found[:, 1] / 2**0.5) ** 2 < 0.25  # a quarter of the ellipse's area
    assert inner.mean() == pytest.approx(0.25, abs=0.015)
    assert dosnes.hammer(np.array([[1.0, 0, 0], [0, 0, 1.0]])) == pytest.approx(np.array([[0, 0], [0, 2**0.5]]))


def test_samples_without_any_structure_are_spread_over_the_globe():
    places = dosnes.embed(np.random.default_rng(4).normal(size=(200, 30)), 30.0)
    assert np.linalg.norm(places, axis=1) == pytest.approx(1.0)
    assert np.linalg.norm(places.mean(0)) < 0.1
    assert (np.linalg.eigvalsh(places.T @ places / 200) > 0.2).all()  # a third in each direction
