"""How good a model is, and what real and synthetic rows still teach it (GenDataAgent 3.1 and Figure 6).

Knows tensors and a task's loss; not where the images come from, nor where the numbers go.

Shapes: N samples, B rows, H, W pixels, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from trainer.eval_mode import eval_mode
from trainer.losses.cross_entropy import cross_entropy
from trainer.tasks.interface import Task


@dataclass(frozen=True)
class Evaluation:
    """Accuracies are parts of one."""

    top1: float
    per_class: list[float | None]  # accuracy of each class; None: no samples of it
    worst_case_disparity: float  # lowest over highest class accuracy (Ghosh et al. 2021); 1 is fair, 0 if all are 0
    loss: float  # mean cross entropy in nats, without label smoothing


def evaluate(logits: Tensor, labels: Tensor, n_classes: int) -> Evaluation:
    """Evaluate a classifier's predictions.

    Args:
        logits: [N, C], N >= 1, of the model in eval mode. labels: [N], int64. n_classes: C.
    """
    assert len(labels) > 0
    correct = logits.argmax(1) == labels
    count = torch.bincount(labels, minlength=n_classes)
    hits = torch.bincount(labels[correct], minlength=n_classes)
    per_class = [hit / n if n else None for hit, n in zip(hits.tolist(), count.tolist(), strict=True)]
    present = [accuracy for accuracy in per_class if accuracy is not None]
    best = max(present)
    return Evaluation(
        top1=correct.double().mean().item(),
        per_class=per_class,
        worst_case_disparity=min(present) / best if best else 0.0,
        loss=cross_entropy(logits, labels).double().mean().item(),
    )


def train_val_gap(train: float, val: float) -> float:
    """Training minus validation accuracy (Figure 6a, Table 14): how much the model overfits."""
    return train - val


def gradient_magnitude(task: Task, model: nn.Module, x: Tensor, y: Tensor, *, chunk_size: int = 8) -> float:
    """Mean over rows of the L2 norm of the row's loss gradient (Figure 6b), in eval mode.

    Args:
        model: the gradient is with respect to its trainable parameters; neither they nor `.grad` change.
        x: [B, 3, H, W], or clips [B, M, 3, H, W], preprocessed, B >= 1. y: [B].
        chunk_size: rows whose gradients are held at once, each the size of the model.
    """
    assert len(x) > 0
    named = dict(model.named_parameters())
    trainable = {name: parameter.detach() for name, parameter in named.items() if parameter.requires_grad}

    def loss(weights: dict[str, Tensor], row: Tensor, label: Tensor) -> Tensor:
        return task.losses(functional_call(model, weights, (row[None],)), label[None]).sum()

    def norm(row: Tensor, label: Tensor) -> Tensor:
        gradients = grad(loss)(trainable, row, label)
        return torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt()

    with eval_mode(model), sdpa_kernel(SDPBackend.MATH):  # vmap has no rule for the fused attention kernels
        x = x.contiguous()  # nor for the pooling of several frames whose channels lie last
        return vmap(norm, chunk_size=chunk_size)(x, y).mean().item()
