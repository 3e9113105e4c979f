"""Lookahead selection (RL-identity 4.3): of a mixed batch, train on the synthetic rows that agree with the step that
the whole batch asks for.

This module knows a model, a loss and a batch; not the optimizer, nor what the rows are. Pass the bare module, not its
DDP wrapper: the virtual step is this process's own.

Shapes: B rows of the mixed batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.func import functional_call

Losses = Callable[[Tensor, Tensor], Tensor]  # outputs, y -> [B]
Autocast = Callable[[], AbstractContextManager]


def lookahead(
    model: nn.Module,
    losses: Losses,
    x: Tensor,
    y: Tensor,
    synthetic: Tensor,
    *,
    virtual_lr: float,
    keep: float = 0.5,
    autocast: Autocast = nullcontext,
) -> Tensor:
    """Which rows to train on: all real ones, and the ceil(keep * n) of the n synthetic ones with the smallest Δl.

    Without synthetic rows, or when all are kept, nothing is computed.

    Args:
        synthetic: [B], bool, True for synthetic rows.
        keep: part of the synthetic rows to keep, in [0, 1]; a remainder counts as a row.
        model, losses, x, y, virtual_lr, autocast: as in `lookahead_scores`.

    Returns:
        [B], bool. Of equal scores the earlier row is kept first; a NaN counts as the largest.
    """
    assert 0.0 <= keep <= 1.0
    candidates = synthetic.nonzero().squeeze(1)
    n_kept = math.ceil(keep * len(candidates) - 1e-9)  # 0.1 * 30 is 3.000...04
    if n_kept == len(candidates):
        return torch.ones_like(synthetic)
    scores = lookahead_scores(model, losses, x, y, virtual_lr=virtual_lr, autocast=autocast)
    best = torch.argsort(scores[candidates], stable=True)[:n_kept]
    selected = ~synthetic
    selected[candidates[best]] = True
    return selected


def lookahead_scores(
    model: nn.Module,
    losses: Losses,
    x: Tensor,
    y: Tensor,
    *,
    virtual_lr: float,
    autocast: Autocast = nullcontext,
) -> Tensor:
    """Δl = l(w', x) - l(w, x) of every row, RL-identity eq. 12.

    w' is one plain-SGD step from w on the mean loss of the whole batch. Both losses are taken in train mode on the
    whole batch, with the same dropout. Parameters, buffers, `.grad` fields and the random state of the CPU and of x's
    device are left as they were; frozen parameters take no part in the step.

    Args:
        model: in train mode.
        losses: outputs and labels to the loss [B] of each row.
        x: [B, ...], on the model's device. y: [B].
        virtual_lr: step size from w to w'.
        autocast: makes the context for forward and loss, such as a `torch.autocast`.

    Returns:
        [B]; negative where the step helps the row.
    """
    assert model.training
    weights = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.enable_grad():
        before = _row_losses(model, weights, losses, x, y, autocast)
        gradients = torch.autograd.grad(before.mean(), list(weights.values()), materialize_grads=True)
    with torch.no_grad():
        stepped = {
            name: torch.add(parameter, gradient, alpha=-virtual_lr)
            for (name, parameter), gradient in zip(weights.items(), gradients, strict=True)
        }
        after = _row_losses(model, stepped, losses, x, y, autocast)
    return after - before.detach()


def _row_losses(
    model: nn.Module, weights: Mapping[str, Tensor], losses: Losses, x: Tensor, y: Tensor, autocast: Autocast
) -> Tensor:
    """Losses [B] under other weights, with copies of the buffers and from the present random state, which stays."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    devices = [] if x.device.type == "cpu" else [x.device]
    with torch.random.fork_rng(devices, device_type=x.device.type), autocast():
        return losses(functional_call(model, {**weights, **buffers}, (x,)), y)
