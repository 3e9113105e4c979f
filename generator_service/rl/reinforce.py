"""REINFORCE: teaches a sampling policy what it was rewarded for (ARGen 3.3, eqs. 19-21).

Knows nothing of what the rewards are for.

    B states, K actions of each
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from generator_service.rl.sampling_policy import SamplingPolicy
from protocol.errors import TrainingDiverged


def surrogate(log_prob: Tensor, rewards: Tensor) -> Tensor:
    """What is minimised: -mean of R(u) log pi(u | s), whose gradient is minus the estimate of eqs. 20 and 21.

    Args:
        log_prob: of actions that were drawn from the policy, [B, K]; eq. 21's sum over the heads is in it.
        rewards: of the same actions, [B, K]; no gradient passes through them.
    """
    return -(rewards.detach() * log_prob).mean()


def compared(rewards: Tensor, baseline: str) -> Tensor:
    """Rewards [B, K] as they teach: with baseline "none" as they are, with "state" less the mean of their state's
    candidates, so that what is drawn often is not learnt for that alone, nor anything where all are alike."""
    return rewards - rewards.mean(1, keepdim=True) if baseline == "state" else rewards


class Learner:
    """A policy and its optimiser."""

    def __init__(self, policy: SamplingPolicy, learning_rate: float):
        self._policy = policy
        self._optimizer = torch.optim.Adam(policy.parameters(), lr=learning_rate)

    def learn(self, latents: Tensor, text: Tensor, chosen: Tensor, rewards: Tensor) -> float:
        """One update towards what was rewarded; its loss.

        Args:
            latents: [B, C, h, w]. text: [B, T, D]. chosen: int64 [B, K]. rewards: [B, K].

        Raises TrainingDiverged when the loss or a gradient is not finite; the policy stays as it was then.
        """
        loss = surrogate(self._policy.log_prob(latents, text, chosen), rewards.float())
        self._optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._policy.parameters() if p.grad is not None])
        if not (loss.isfinite() and norm.isfinite()):
            raise TrainingDiverged("the policy's loss or gradient is not finite: lower the job's learning_rate")
        self._optimizer.step()
        return loss.item()

    def state(self) -> dict[str, Any]:
        """To `restore` from; its tensors are those in use."""
        return {"policy": self._policy.state_dict(), "optimizer": self._optimizer.state_dict()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._policy.load_state_dict(state["policy"])
        self._optimizer.load_state_dict(state["optimizer"])
