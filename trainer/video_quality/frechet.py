"""The Frechet distance of two sets of features as if each were of one Gaussian (ARGen eqs. 27 to 29).

Exact for sets with fewer members than features, too, whose covariances are singular. Pure functions of tensors; knows
nothing of clips, nor of the network that the features come from.

Shapes: N and M members of the two sets, D features, K = min(N, D), L = min(M, D).
"""

from __future__ import annotations

import torch
from torch import Tensor

FEWEST = 2  # members of a set that have a covariance


def frechet_distance(generated: Tensor, real: Tensor) -> float:
    """|mu_g - mu_t|^2 + Tr(S_g + S_t - 2 (S_g S_t)^(1/2)), never below 0; covariances are over N - 1 (eq. 28).

    The eigenvalues of S_g S_t are the squared singular values of A_g A_t^T, where S = A^T A, so that the trace of the
    root is their sum: no root of a matrix is taken, nothing inverted. Rounding costs about 1e-16 times the largest
    singular value, where roots of computed eigenvalues would have half the digits. With N and M below D it is a
    decomposition of N x M instead of D x D.

    Args:
        generated: [N, D]. real: [M, D]. N and M at least 2, all finite.
    """
    assert generated.ndim == real.ndim == 2 and generated.shape[1] == real.shape[1], (generated.shape, real.shape)
    assert len(generated) >= FEWEST and len(real) >= FEWEST, (len(generated), len(real))
    mean_g, factor_g = moments(generated)
    mean_t, factor_t = moments(real)
    overlap = torch.linalg.svdvals(factor_g @ factor_t.T).sum()
    spread = factor_g.square().sum() + factor_t.square().sum() - 2 * overlap
    return max(0.0, float((mean_g - mean_t).square().sum() + spread))


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D] and a factor A [K, D] of the covariance A^T A, both float64 (eqs. 27 and 28).

    Args:
        features: [N, D].
    """
    features = features.double()
    mean = features.mean(0)
    factor = (features - mean) / (len(features) - 1) ** 0.5
    if len(factor) > factor.shape[1]:
        factor = torch.linalg.qr(factor, mode="r").R  # rotates the rows, which A^T A does not see
    return mean, factor
