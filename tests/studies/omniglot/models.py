"""Who gives the rewards and who judges: two classifiers that share neither architecture, nor images, nor domain.

The reward model has seen the general domain's characters and none of the target's; the judge has seen the target's
identities as drawn by people whose drawings neither generator nor trainer gets. Knows nothing of generators.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.studies.omniglot.characters import SIDE, Characters, signed, warped

REWARD_MODEL, REWARD_SIDE = "resnet10t", 32


def reward_model(file: Path, characters: Characters, steps: int = 1200) -> nn.Module:
    """A timm model of images [B, 3, 32, 32] in [-1, 1] that knows the general domain; at once if its file is there."""
    model = timm.create_model(REWARD_MODEL, num_classes=len(characters.names))
    return _trained(file, model, characters, lambda x: _rgb(x, REWARD_SIDE), steps, rate=2e-3, seed=11)


class Judge(nn.Module):
    """A plain network of 5 x 5 convolutions without normalisation, on images [B, 1, SIDE, SIDE] in [-1, 1]."""

    def __init__(self, classes: int):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(1, 32, 5, stride=2, padding=2), nn.GELU()),
            *(nn.Conv2d(32, 64, 5, stride=2, padding=2), nn.GELU()),
            *(nn.Conv2d(64, 96, 3, stride=2, padding=1), nn.GELU()),
            *(nn.Flatten(), nn.Linear(96 * (SIDE // 8) ** 2, 128), nn.GELU()),
        )
        self.head = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def judge(file: Path, characters: Characters, steps: int = 1500) -> Judge:
    """Trained on these; at once when its file is there."""
    return _trained(file, Judge(len(characters.names)), characters, lambda x: x, steps, rate=1e-3, seed=29)


@torch.no_grad()
def accuracy(model: nn.Module, characters: Characters, prepare: Callable[[Tensor], Tensor] = lambda x: x) -> float:
    predicted = torch.cat([model(prepare(x)).argmax(1) for x in signed(characters.images).split(256)])
    return (predicted.numpy() == characters.labels).mean().item()


def _rgb(x: Tensor, side: int) -> Tensor:
    return F.interpolate(x, (side, side), mode="bicubic", antialias=True).expand(-1, 3, -1, -1)


def _trained(
    file: Path,
    model: nn.Module,
    characters: Characters,
    prepare: Callable[[Tensor], Tensor],
    steps: int,
    rate: float,
    seed: int,
) -> nn.Module:
    if not file.exists():
        torch.manual_seed(seed)
        rng = torch.Generator().manual_seed(seed)
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        images, labels = signed(characters.images), torch.from_numpy(characters.labels)
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.02)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
        model.train()
        for _ in range(steps):
            rows = torch.randint(len(images), (64,), generator=rng)
            loss = F.cross_entropy(model(prepare(warped(images[rows], rng, 1.3))), labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), file)
    model.load_state_dict(load_file(file))
    return model.eval()


def diversity(features: np.ndarray, labels: np.ndarray) -> float:
    """Mean Euclidean distance of two different samples of an identity; features [N, D]."""
    found = []
    for label in np.unique(labels):
        own = features[labels == label]
        distances = np.linalg.norm(own[:, None] - own[None], axis=-1)
        found.append(distances.sum() / (len(own) * (len(own) - 1)))
    return float(np.mean(found))
