"""What DPOK minimises (Fan et al. 2023; RL-identity eq. 1): a clipped importance-weighted policy gradient, and the
distance to the frozen generator.

Pure functions of tensors. Knows nothing of models, of how a log-probability comes about, or of the weights of terms.

    B transitions, C channels of the latents, h w their height and width
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Surrogate(NamedTuple):
    loss: Tensor  # [B], to be minimised: less where good samples got more probable
    ratio: Tensor  # [B], probability now over probability when drawn; without gradients
    clipped: Tensor  # bool [B], the clip holds: the row has no gradient


def surrogate(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, clip: float) -> Surrogate:
    """The gradient of eq. 1, for steps that were drawn with slightly older weights.

    loss = max(-advantage * ratio, -advantage * clamp(ratio, 1 - clip, 1 + clip)), as in PPO. The larger one is the
    pessimistic one: what has moved past the clip in the good direction gains nothing by moving on, while a move in the
    bad direction is always undone. At ratio 1 the gradient is -advantage times that of log_prob.

    Args:
        log_prob: [B], differentiable, of `logprob.log_prob`. old_log_prob: [B], of the same transitions when drawn.
        advantage: [B], reward minus baseline. clip: how far the ratio may go from 1.
    """
    ratio = (log_prob - old_log_prob.detach()).exp()
    advantage = advantage.detach()
    free = -advantage * ratio
    held = -advantage * ratio.clamp(1 - clip, 1 + clip)
    return Surrogate(torch.maximum(free, held), ratio.detach(), (held > free).detach())


def distance(output: Tensor, reference: Tensor, channels: int | None = None) -> Tensor:
    """Mean squared difference of (guided) predictions over C h w: [B].

    Stands for the Kullback-Leibler divergence of the two generators' steps, which is this times a factor that depends
    on the time only.

    Args:
        output: [B, C or 2C, h, w], differentiable. reference: the same of the frozen generator.
        channels: C, where a variance follows that does not count; None: all count.
    """
    return (output[:, :channels] - reference[:, :channels].detach()).square().flatten(1).mean(1)
