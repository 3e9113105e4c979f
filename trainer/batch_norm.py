"""Batch normalisation over the rows that several processes hold, as if one held them all.

Takes the place of `torch.nn.functional.batch_norm` while it is entered, for whichever layers call it; the model and its
state dict stay as they are. Knows nothing of models.

Shapes: B rows of this process (0 too), C channels, P processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules._functions import SyncBatchNorm
from torch.overrides import TorchFunctionMode


class SynchronisedBatchNorm(TorchFunctionMode):
    """In the block, batch normalisation in train mode takes its statistics over the rows of the whole group.

    Every process must make the same passes. On a GPU torch's own kernels do it; they know no CPU.
    """

    def __init__(self, group: dist.ProcessGroup):
        super().__init__()
        self._group = group

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is F.batch_norm:
            return self._batch_norm(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))

    def _batch_norm(
        self,
        input: Tensor,  # [B, C, ...], as torch names it
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training:
            return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        if input.is_cuda:
            size = dist.get_world_size(self._group)
            return SyncBatchNorm.apply(input, weight, bias, running_mean, running_var, eps, momentum, self._group, size)
        x = input.float() if input.dtype.itemsize < 4 else input
        scale = x.new_ones(x.shape[1]) if weight is None else weight.to(x.dtype)
        shift = x.new_zeros(x.shape[1]) if bias is None else bias.to(x.dtype)
        normalised, mean, variance, count = Normalise.apply(x, scale, shift, eps, self._group)
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((variance * (count / (count - 1))).to(running_var.dtype), momentum)
        return normalised.to(input.dtype)


class Normalise(torch.autograd.Function):
    """weight * (x - mean) / sqrt(variance + eps) + bias of x [B, C, ...] by the moments of all processes' rows.

    On the CPU. One exchange forward, of each process's own moments, which keeps digits that sums of squares would lose;
    one backward. Returns that, and without gradients mean [C], population variance [C] and the count [C] of values.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        count = x.numel() // x.shape[1]
        own = x.new_zeros(3, x.shape[1])  # count, mean and variance of each channel
        if count:
            own[0], (own[1], own[2]) = count, torch.batch_norm_update_stats(x, None, None, 0.0)
        every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(every, own, group=group)
        counts, means, variances = torch.stack(every, 1)  # each [P, C]
        total = counts.sum(0)
        if bool((total < 2).any()):
            raise ValueError("batch statistics of one value a channel: they want two in training")
        mean = (counts * means).sum(0) / total
        variance = (counts * (variances + (means - mean).square())).sum(0) / total
        ctx.save_for_backward(x, weight, mean, variance, total)
        ctx.eps, ctx.group = eps, group
        ctx.mark_non_differentiable(mean, variance, total)
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps), mean, variance, total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, weight, mean, variance, total = ctx.saved_tensors
        by_x, by_weight, by_bias = torch.zeros_like(x), torch.zeros_like(weight), torch.zeros_like(weight)
        if len(x):  # as if mean and variance were constants; the kernel knows no empty batch
            by_x, by_weight, by_bias = torch.ops.aten.native_batch_norm_backward(
                gradient, x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
            )
        sums = torch.stack([by_weight, by_bias])
        dist.all_reduce(sums, group=ctx.group)
        scale = (variance + ctx.eps).rsqrt()  # now through them: they depend on the rows of all processes
        through_variance, through_mean = -weight * scale / total * sums
        by_x.add_(_spread(through_mean, x)).addcmul_(x - _spread(mean, x), _spread(through_variance * scale, x))
        return by_x, by_weight, by_bias, None, None


def _spread(channels: Tensor, like: Tensor) -> Tensor:
    """[C] -> [C, 1, ...], to go with [B, C, ...]."""
    return channels.view(-1, *[1] * (like.dim() - 2))
