"""Which real samples the model is least sure of: the feedback for the generator (GenDataAgent 2.2).

Every criterion maps logits to scores of which the LOWEST are the most marginal, so that one selection serves them all.
Scores are float64: in float32 the probabilities of a well-fitted set round to 1 and their order is lost. This module
does not know how the logits were made, nor what is done with the samples it picks.

Shapes: N samples, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def marginal(logits: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Softmax probability of the true class, GenDataAgent eq. 1.

    Args:
        logits: [N, C]. labels: [N], int64. generator: not used.

    Returns:
        [N], in [0, 1].
    """
    return logits.double().softmax(1).gather(1, labels[:, None]).squeeze(1)


def entropy(logits: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Negated entropy of the predicted distribution in nats, the selection of Hemmat et al. 2023.

    Args:
        logits: [N, C]. labels: not used. generator: not used.

    Returns:
        [N], in [-log C, 0].
    """
    log_p = logits.double().log_softmax(1)
    return (log_p.exp() * log_p).sum(1)


def random(logits: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform scores in [0, 1), whatever the model says: the baseline.

    Args:
        logits: [N, C]; only N and the device count. labels: not used. generator: the source of randomness.
    """
    draws = torch.rand(len(logits), generator=generator, device=generator.device, dtype=torch.float64)
    return draws.to(logits.device)


def lowest(scores: Tensor, k: int) -> Tensor:
    """Indices of the k lowest scores, lowest first; equal scores in order of index.

    Args:
        scores: [N]. k: how many; at most N are returned.

    Returns:
        [min(k, N)], int64.
    """
    return torch.argsort(scores, stable=True)[:k]
