"""Doubly stochastic neighbour embedding on a sphere (DOSNES, Lu, Corander and Yang 2019): many features as places on a
globe, without the crowded middle and the empty edge of a plane.

Knows arrays; not what the samples are, nor how the globe is drawn. Shapes: N samples, K features.
"""

from __future__ import annotations

import numpy as np

ITERATIONS = 300
EXAGGERATED = 75  # of them at first, with affinities enlarged, so that clusters form
EXAGGERATION = 4.0
LEAST_RADIUS = 0.1  # while samples gather, in units of the similarities' kernel
BALANCED = 1e-9  # how far sums of rows may be from 1
SMALLEST = 1e-12


def affinities(features: np.ndarray, perplexity: float) -> np.ndarray:
    """t-SNE's symmetric affinities [N, N]: Gaussian in each sample's neighbourhood, of equal perplexity.

    Args:
        features: [N, K], N > 3 perplexity. perplexity: how many neighbours a sample has, about.
    """
    squares = _squared_distances(features)
    np.fill_diagonal(squares, np.inf)
    squares -= squares.min(1, keepdims=True)  # of a row, that changes nothing but rounding
    low, high = np.full((len(squares), 1), -80.0), np.full((len(squares), 1), 80.0)  # log of the precisions
    wanted = np.log(perplexity)
    for _ in range(60):
        middle = (low + high) / 2
        found = _gaussian(squares, middle)
        too_wide = -(found * np.log(np.maximum(found, SMALLEST))).sum(1, keepdims=True) > wanted
        low, high = np.where(too_wide, middle, low), np.where(too_wide, high, middle)
    found = _gaussian(squares, (low + high) / 2)
    return (found + found.T) / 2


def doubly_stochastic(matrix: np.ndarray, most: int = 10_000) -> np.ndarray:
    """The symmetric matrix D M D [N, N] whose rows and columns each sum to 1 (Sinkhorn and Knopp, symmetric form).

    Args:
        matrix: symmetric, not negative, without a row of zeros. most: iterations.
    """
    scale = 1 / np.sqrt(matrix.sum(1))
    for _ in range(most):
        sums = scale * (matrix @ scale)
        if np.abs(sums - 1).max() < BALANCED:
            break
        scale /= np.sqrt(sums)
    return scale[:, None] * matrix * scale


def cost(p: np.ndarray, y: np.ndarray) -> float:
    """KL(P || Q), Q the Student-t similarities of the places y [N, 3]; P [N, N] sums to 1."""
    _, q = _similarities(y)
    own = p > 0
    return float((p[own] * np.log(p[own] / q[own])).sum())


def gradient(p: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Of `cost` with respect to y, [N, 3]."""
    kernel, q = _similarities(y)
    pull = (p - q) * kernel
    return 4 * (pull.sum(1)[:, None] * y - pull @ y)


def embed(features: np.ndarray, perplexity: float) -> np.ndarray:
    """Places [N, 3] on the unit sphere: gradient descent with momentum, and after each step back onto the sphere of
    the mean radius. The same features give the same places.

    Args:
        features: [N, K], K >= 3, principal components first. perplexity: as in `affinities`.
    """
    p = doubly_stochastic(affinities(features, perplexity) + SMALLEST * (1 - np.eye(len(features)))) / len(features)
    y = _on_sphere(features[:, :3] / np.maximum(features[:, :3].std(0), SMALLEST), LEAST_RADIUS)
    velocity, gains, rate = np.zeros_like(y), np.ones_like(y), len(features) / (4 * EXAGGERATION)
    for iteration in range(ITERATIONS):
        early = iteration < EXAGGERATED
        slope = gradient(p * (EXAGGERATION if early else 1.0), y)
        gains = np.maximum(np.where(np.sign(slope) == np.sign(velocity), 0.8 * gains, gains + 0.2), 0.01)
        velocity = (0.5 if early else 0.8) * velocity - rate * gains * slope
        moved = y + velocity
        moved -= moved.mean(0)
        y = _on_sphere(moved, max(np.linalg.norm(moved, axis=1).mean(), LEAST_RADIUS))
    return _on_sphere(y, 1.0)


def hammer(places: np.ndarray) -> np.ndarray:
    """The globe as a map of equal areas, [N, 2] of [N, 3]: an ellipse of half axes 2 sqrt 2 and sqrt 2."""
    longitude, latitude = np.arctan2(places[:, 1], places[:, 0]) / 2, np.arcsin(np.clip(places[:, 2], -1, 1))
    scale = np.sqrt(2 / (1 + np.cos(latitude) * np.cos(longitude)))
    return np.stack([2 * np.cos(latitude) * np.sin(longitude) * scale, np.sin(latitude) * scale], 1)


def _squared_distances(x: np.ndarray) -> np.ndarray:
    norms = (x * x).sum(1)
    return np.maximum(norms[:, None] + norms - 2 * x @ x.T, 0.0)


def _gaussian(squares: np.ndarray, log_precision: np.ndarray) -> np.ndarray:
    with np.errstate(under="ignore"):
        found = np.exp(-squares * np.exp(log_precision))
    return found / found.sum(1, keepdims=True)


def _similarities(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Student-t kernel 1 / (1 + |y_i - y_j|^2), 0 on the diagonal, and the same so that all of it sums to 1."""
    kernel = 1 / (1 + _squared_distances(y))
    np.fill_diagonal(kernel, 0.0)
    return kernel, np.maximum(kernel / kernel.sum(), SMALLEST)


def _on_sphere(y: np.ndarray, radius: float) -> np.ndarray:
    return radius * y / np.maximum(np.linalg.norm(y, axis=1, keepdims=True), SMALLEST)
