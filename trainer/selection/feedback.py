"""Which real samples the model is least sure of: the feedback for the generator (GenDataAgent 2.2).

Every criterion maps scored samples to scores of which the LOWEST are the most marginal, so that one selection serves
them all. Scores are float64: in float32 the probabilities of a well-fitted set round to 1 and their order is lost. This
module does not know how the logits were made, nor what is done with the samples that are picked.

Shapes: N samples, C classes, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scored:
    """What a criterion may look at; it takes what it needs."""

    logits: Tensor  # [N, C]
    labels: Tensor  # [N], int64
    features: Callable[[], Tensor]  # [N, D]: costs another pass over the samples
    generator: torch.Generator  # the only source of randomness
    neighbours: int = 15  # that similarity looks at


def marginal(samples: Scored) -> Tensor:
    """Softmax probability [N] of the true class, in [0, 1]: GenDataAgent eq. 1."""
    return samples.logits.double().softmax(1).gather(1, samples.labels[:, None]).squeeze(1)


def entropy(samples: Scored) -> Tensor:
    """Negated entropy [N] of the predicted distribution in nats, in [-log C, 0]: Hemmat et al. 2023."""
    log_p = samples.logits.double().log_softmax(1)
    return (log_p.exp() * log_p).sum(1)


def random(samples: Scored) -> Tensor:
    """Uniform scores [N] in [0, 1), whatever the model says: the baseline."""
    generator, n = samples.generator, len(samples.labels)
    return torch.rand(n, generator=generator, device=generator.device, dtype=torch.float64).to(samples.logits.device)
