"""What a sample's reward is worth: how far it is above what was expected. Knows nothing of models or rewards."""

from __future__ import annotations

import torch

from generator_service.rl.reverse_process import ReverseProcess
from generator_service.rl.trajectories import Transitions
from generator_service.rl.value import Baseline


class Advantage:
    """Of one rollout's transitions."""

    def __init__(self, process: ReverseProcess, baseline: Baseline, rewards: torch.Tensor, of_latents: bool):
        """
        Args:
            rewards: float32 [n], of the rollout's rows.
            of_latents: the baseline looks at each transition's latents, and learns from each; else once from each row.
        """
        self._process, self._baseline, self._rewards, self._of_latents = process, baseline, rewards, of_latents

    def __call__(self, piece: Transitions) -> torch.Tensor:
        """float32 [B], on the latents' device."""
        times = self._process.times[piece.steps] / self._process.trained_steps
        rewards = self._rewards.to(piece.rows.device)[piece.rows]
        expected = self._baseline.values(piece.before, times, piece.labels)
        if self._of_latents:
            self._baseline.fit(piece.before, times, piece.labels, rewards)
        return rewards - expected

    def fit(self, labels: torch.Tensor) -> None:
        """The rollout has been learnt from: the baseline may, too. Labels int64 [n]."""
        if not self._of_latents:
            nothing = torch.empty(0)
            self._baseline.fit(nothing, nothing, labels, self._rewards)
