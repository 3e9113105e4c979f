"""Files as a trainer publishes them: real timm models with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
from safetensors.torch import save
from torch import nn

from protocol.published import PublishedCard

HALF = (0.5, 0.25, 0.5)


def random_model(name: str = "test_resnet", seed: int = 0, **options: Any) -> nn.Module:
    """With statistics of batch normalisation that are not those of a new model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(name, num_classes=0, **options).eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2.0)
    return model


def card(name: str = "test_resnet", size: tuple[int, int] = (32, 32), **fields: Any) -> PublishedCard:
    known = {"mean": HALF, "std": (0.25, 0.5, 0.125), "run": "r", "iteration": 0, "updates": 7}
    return PublishedCard(model=name, size=size, **known | fields)


def published_file(
    name: str = "test_resnet",
    size: tuple[int, int] = (32, 32),
    seed: int = 0,
    change: Callable[[dict[str, torch.Tensor]], object] = lambda state: None,
    **fields: Any,
) -> bytes:
    """`change`: made to the tensors. `fields`: of the card."""
    state = random_model(name, seed, **fields.get("options", {})).state_dict()
    change(state)
    return save(state, card(name, size, **fields).metadata())
