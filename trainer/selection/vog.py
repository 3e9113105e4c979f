"""Variance of gradients (Agarwal et al. 2022) as GenDataAgent 2.4 uses it: synthetic samples far from the
distribution have little of it and are dropped.

This module knows models, tensors and snapshots; not where the snapshots come from, nor what a sample is.

Shapes: N samples, C checkpoints, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from trainer.eval_mode import eval_mode

Snapshot = Mapping[str, Tensor]  # a state_dict
Logit = Callable[[Tensor, Tensor], Tensor]  # outputs, y -> [N]
Spread = Literal["std", "variance"]
BATCH = 64  # rows of one backward, where they are images
COLOURS = -3  # dimension of the channels, of images and of clips


def true_class_logit(outputs: Tensor, y: Tensor) -> Tensor:
    """[N] of outputs [N, classes] at labels y [N]."""
    return outputs.gather(1, y[:, None]).squeeze(1)


def vog(
    model: nn.Module,
    snapshots: Sequence[Snapshot],
    x: Tensor,
    y: Tensor,
    *,
    logit: Logit = true_class_logit,
    spread: Spread = "std",
    batch_size: int = BATCH,
) -> Tensor:
    """Variance of gradients of each sample, GenDataAgent eqs. 4-6.

    The gradient of the true-class logit with respect to the normalised input, averaged over colour channels; its
    population spread over the checkpoints at each pixel, of a clip at each pixel of each frame; the mean over these.
    The model runs in eval mode, with the snapshots' weights and statistics; its own are neither read nor changed. The
    rows of a batch share one backward a checkpoint, through the inputs only; memory beyond the snapshots does not
    depend on their number.

    Args:
        model: gives the architecture; rows must not influence each other in eval mode.
        snapshots: C >= 2 complete state_dicts, on any device.
        x: [N, 3, H, W], or clips [N, M, 3, H, W], normalised, on the model's device.
        y: [N], int64.
        logit: outputs and labels to the [N] values that are differentiated.
        spread: "std", or "variance" as the acronym has it.
        batch_size: rows of one backward.

    Returns:
        [N], of x's dtype.
    """
    assert len(snapshots) >= 2, "the spread over one checkpoint is zero"
    scores = x.new_empty(len(x))
    with eval_mode(model):
        for start in range(0, len(x), batch_size):
            rows = slice(start, start + batch_size)
            gradients = (_input_gradient(model, snapshot, x[rows], y[rows], logit) for snapshot in snapshots)
            scores[rows] = _score(gradients, spread)
    return scores


def vog_from_gradients(gradients: Tensor, *, spread: Spread = "std") -> Tensor:
    """Variance of gradients [N] from channel-averaged gradients [N, C, ..., H, W] of C checkpoints: eqs. 5 and 6."""
    return _score(gradients.unbind(1), spread)


def _input_gradient(model: nn.Module, snapshot: Snapshot, x: Tensor, y: Tensor, logit: Logit) -> Tensor:
    """Gradient [N, ..., H, W] of the logit with respect to x, averaged over the channels: eq. 4."""
    missing = model.state_dict().keys() - snapshot.keys()
    assert not missing, f"the snapshot lacks {sorted(missing)}"
    weights = {name: tensor.detach().to(x.device) for name, tensor in snapshot.items()}
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        outputs = functional_call(model, weights, (x,), tie_weights=False)
        (gradient,) = torch.autograd.grad(logit(outputs, y).sum(), x)
    return gradient.mean(COLOURS)


def _score(gradients: Iterable[Tensor], spread: Spread) -> Tensor:
    """Spread over an iteration of C gradients [N, ..., H, W], averaged over pixels: [N]. Welford's running moments."""
    for count, gradient in enumerate(gradients, start=1):
        if count == 1:
            mean, squares = gradient.clone(), torch.zeros_like(gradient)
            continue
        delta = gradient - mean
        mean += delta / count
        squares.addcmul_(delta, delta, value=(count - 1) / count)
    variance = squares / count
    per_pixel = variance.sqrt() if spread == "std" else variance
    return per_pixel.flatten(1).mean(1)
