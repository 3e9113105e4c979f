"""Lookahead selection (RL-identity 4.3): of a mixed batch, train on the synthetic rows that agree with the step that
the whole batch asks for.

This module knows a model, a loss and a batch; not the optimizer, nor what the rows are. When several processes share a
batch, the virtual step is still that of the whole batch, and its synthetic rows are ranked together: `mean`, `average`
and `gather` say how. Pass the bare module, not its DDP wrapper.

Shapes: B rows of the mixed batch, b of them in this process: b = B where one process holds it all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.func import functional_call

Losses = Callable[[Tensor, Tensor], Tensor]  # outputs, y -> [B]
Context = Callable[[], AbstractContextManager]
Mean = Callable[[Tensor], Tensor]  # losses [b] -> the mean over the whole batch, to go backward from
Average = Callable[[Sequence[Tensor]], Sequence[Tensor]]  # gradients of that in this process -> those of all
Gather = Callable[[Tensor], Tensor]  # [b] -> [B]


def alone(values: Tensor) -> Tensor:
    """`gather` where one process holds the whole batch."""
    return values


def lookahead(
    model: nn.Module,
    losses: Losses,
    x: Tensor,
    y: Tensor,
    synthetic: Tensor,
    *,
    virtual_lr: float,
    keep: float = 0.5,
    context: Context = nullcontext,
    mean: Mean = torch.mean,
    average: Average = tuple,
    gather: Gather = alone,
) -> Tensor:
    """Which rows to train on: all real ones, and the ceil(keep * n) of the n synthetic ones with the smallest Δl.

    Without synthetic rows, or when all are kept, nothing is computed.

    Args:
        synthetic: [B], bool, True for synthetic rows.
        keep: part of the synthetic rows to keep, in [0, 1]; a remainder counts as a row.
        gather: the scores [B] of all processes' rows, from those [b] of this one.
        model, losses, x, y, virtual_lr, context, mean, average: as in `lookahead_scores`.

    Returns:
        [B], bool. Of equal scores the earlier row is kept first; a NaN counts as the largest.
    """
    assert 0.0 <= keep <= 1.0
    candidates = synthetic.nonzero().squeeze(1)
    n_kept = math.ceil(keep * len(candidates) - 1e-9)  # 0.1 * 30 is 3.000...04
    if n_kept == len(candidates):
        return torch.ones_like(synthetic)
    own = lookahead_scores(model, losses, x, y, virtual_lr=virtual_lr, context=context, mean=mean, average=average)
    scores = gather(own)
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
    context: Context = nullcontext,
    mean: Mean = torch.mean,
    average: Average = tuple,
) -> Tensor:
    """Δl = l(w', x) - l(w, x) of every row, RL-identity eq. 12.

    w' is one plain-SGD step from w on the mean loss of the whole batch. Both losses are taken in train mode on the
    whole batch, with the same dropout. Parameters, buffers, `.grad` fields and the random state of the CPU and of x's
    device are left as they were; frozen parameters take no part in the step.

    Args:
        model: in train mode.
        losses: outputs and labels to the loss [B] of each row.
        x: [b, ...], on the model's device. y: [b].
        virtual_lr: step size from w to w'.
        context: makes the context for forward and loss, such as a `torch.autocast`.
        mean: mean loss of the whole batch, differentiable in this process's rows.
        average: averages its gradients over the processes.

    Returns:
        [b]; negative where the step helps the row.
    """
    assert model.training
    weights = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.enable_grad():
        before = _row_losses(model, weights, losses, x, y, context)
        gradients = average(torch.autograd.grad(mean(before), list(weights.values()), materialize_grads=True))
    with torch.no_grad():
        stepped = {
            name: torch.add(parameter, gradient, alpha=-virtual_lr)
            for (name, parameter), gradient in zip(weights.items(), gradients, strict=True)
        }
        after = _row_losses(model, stepped, losses, x, y, context)
    return after - before.detach()


def _row_losses(
    model: nn.Module, weights: Mapping[str, Tensor], losses: Losses, x: Tensor, y: Tensor, context: Context
) -> Tensor:
    """Losses [B] under other weights, with copies of the buffers and from the present random state, which stays."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    devices = [] if x.device.type == "cpu" else [x.device]
    with torch.random.fork_rng(devices, device_type=x.device.type), context():
        return losses(functional_call(model, {**weights, **buffers}, (x,)), y)
