"""Baselines: what reward a sample was to be expected to get, before it did. Subtracted from the reward, they take noise
out of the policy gradient and leave its mean as it is.

Knows nothing of rewards' making or of the generator; torch's global random state stays as it was.

    B transitions, C channels of the latents, h w their height and width, K classes, W width of the net
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RATE = 0.1  # at which a running mean follows
LEARNING_RATE = 1e-3  # of the net
WIDTH = 32  # of the net
FREQUENCIES = 8  # that a time is told in


class Baseline(Protocol):
    """Latents are [B, C, h, w] at times [B], float in [0, 1] with 1 for pure noise, of classes labels int64 [B]."""

    def values(self, latents: Tensor, times: Tensor, labels: Tensor) -> Tensor:
        """Expected rewards, float32 [B] on the latents' device, without gradients."""
        ...

    def fit(self, latents: Tensor, times: Tensor, labels: Tensor, rewards: Tensor) -> float:
        """Learn from the rewards [B] that came of it. Returns the mean squared error from before."""
        ...

    def state(self) -> dict[str, Tensor]:
        """A copy of all that was learnt, on the CPU."""
        ...

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """What `state` gave."""
        ...


def open_baseline(
    kind: Literal["none", "group", "value"],
    classes: int,
    latent_shape: tuple[int, int, int],
    seed: int,
    device: torch.device | str = "cpu",
) -> Baseline:
    """A baseline that has learnt nothing yet and expects 0.

    Args:
        kind: "none": it stays so. "group": the running mean of each identity. "value": a net.
        classes: K. latent_shape: (C, h, w). seed: of the net's first weights. device: where it computes.
    """
    if kind == "none":
        return NoBaseline()
    if kind == "group":
        return RunningMeans(classes)
    return Value(classes, latent_shape[0], seed, torch.device(device))


class NoBaseline:
    """Expects 0."""

    def values(self, latents: Tensor, times: Tensor, labels: Tensor) -> Tensor:
        return torch.zeros(len(labels), device=latents.device)

    def fit(self, latents: Tensor, times: Tensor, labels: Tensor, rewards: Tensor) -> float:
        return 0.0

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        assert not state


class RunningMeans:
    """An exponential running mean of each identity's rewards, from the first on; 0 before. Small, and on the CPU."""

    def __init__(self, classes: int):
        self._means = torch.zeros(classes, dtype=torch.float64)
        self._seen = torch.zeros(classes, dtype=torch.bool)

    def values(self, latents: Tensor, times: Tensor, labels: Tensor) -> Tensor:
        return self._means[labels.cpu()].float().to(latents.device)

    def fit(self, latents: Tensor, times: Tensor, labels: Tensor, rewards: Tensor) -> float:
        labels, rewards = labels.cpu(), rewards.detach().double().cpu()
        error = float((rewards - self._means[labels]).square().mean())
        count = torch.bincount(labels, minlength=len(self._means))
        present = count > 0
        means = torch.bincount(labels, rewards, minlength=len(self._means)) / count.clamp(min=1)
        followed = torch.where(self._seen, self._means + RATE * (means - self._means), means)
        self._means = torch.where(present, followed, self._means)
        self._seen |= present
        return error

    def state(self) -> dict[str, Tensor]:
        return {"means": self._means.clone(), "seen": self._seen.clone()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._means, self._seen = state["means"].clone(), state["seen"].clone()


class Value:
    """A net, with an optimizer of its own: each `fit` is one step of Adam on the mean squared error."""

    def __init__(self, classes: int, channels: int, seed: int, device: torch.device):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._net = _Net(classes, channels).to(device)
        self._device = device
        self._optimizer = torch.optim.Adam(self._net.parameters(), LEARNING_RATE)

    @torch.no_grad()
    def values(self, latents: Tensor, times: Tensor, labels: Tensor) -> Tensor:
        return self._predict(latents, times, labels).to(latents.device)

    @torch.enable_grad()
    def fit(self, latents: Tensor, times: Tensor, labels: Tensor, rewards: Tensor) -> float:
        wanted = rewards.detach().float().to(self._device)
        loss = F.mse_loss(self._predict(latents.detach(), times, labels), wanted)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        return float(loss.detach())

    def state(self) -> dict[str, Tensor]:
        found = {f"net.{name}": value for name, value in self._net.state_dict().items()}
        for name, parameter in self._net.named_parameters():
            moments = self._optimizer.state.get(parameter, {})
            found |= {f"adam.{kind}.{name}": value for kind, value in moments.items()}
        return {name: value.detach().cpu().clone() for name, value in found.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._net.load_state_dict({name: state[f"net.{name}"] for name in self._net.state_dict()})
        self._optimizer.state.clear()
        for name, parameter in self._net.named_parameters():
            kept = {kind: state.get(f"adam.{kind}.{name}") for kind in ("step", "exp_avg", "exp_avg_sq")}
            if kept["step"] is not None:  # a net that never learnt has none
                moments = {kind: value.clone() for kind, value in kept.items() if value is not None}
                on_device = {kind: value.to(self._device) for kind, value in moments.items() if kind != "step"}
                self._optimizer.state[parameter] = moments | on_device

    def _predict(self, latents: Tensor, times: Tensor, labels: Tensor) -> Tensor:
        at = self._device
        return self._net(latents.float().to(at), times.float().to(at), labels.to(at))


class _Net(nn.Module):
    """Two convolutions, pooled, with the time and the class: float32 [B]. Its first prediction is 0."""

    def __init__(self, classes: int, channels: int):
        super().__init__()
        self.look = nn.Sequential(
            nn.Conv2d(channels, WIDTH, 3, padding=1), nn.SiLU(), nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1)
        )
        self.of_time = nn.Linear(2 * FREQUENCIES, WIDTH)
        self.of_class = nn.Embedding(classes, WIDTH)
        self.judge = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 1))
        nn.init.zeros_(self.judge[-1].weight)
        nn.init.zeros_(self.judge[-1].bias)

    def forward(self, latents: Tensor, times: Tensor, labels: Tensor) -> Tensor:
        angles = times[:, None] * (math.pi / 2) * 2.0 ** torch.arange(FREQUENCIES, device=times.device)
        seen = self.look(latents).mean((2, 3))  # [B, W]
        told = self.of_time(torch.cat([angles.sin(), angles.cos()], 1)) + self.of_class(labels)
        return self.judge(seen + told).squeeze(1)
