"""A sampling policy against others that need no learning, on states that it did not learn from.

Every action's reward in each of these states is known, so that all of them are compared on the same clips. Knows
nothing of how rewards come about.

    V states, A actions
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from generator_service.rl.sampling_policy import Action


def report(table: np.ndarray, chosen: np.ndarray) -> dict[str, Any]:
    """What choosing is worth: a mean reward over states each, with its standard error (None of a single state).

    Args:
        table: float64 [V, A], the reward of every action (eq. 18 without penalty).
        chosen: int64 [V], the policy's.

    Returns:
        learned: the policy's choice. random: any action, all alike. fixed: the action that is best on average in these
        very states, its index beside it. oracle: the best in each state. gain: learned - fixed, state by state.
    """
    rows = np.arange(len(table))
    fixed = int(table.mean(0).argmax())
    learned = table[rows, chosen]
    return {
        "states": len(table),
        "learned": _mean(learned),
        "random": _mean(table.mean(1)),
        "fixed": _mean(table[:, fixed]) | {"action": fixed},
        "oracle": _mean(table.max(1)),
        "gain": _mean(learned - table[:, fixed]),
        "agrees": float((table.max(1) == learned).mean()),
    }


def misses(table: np.ndarray, chosen: np.ndarray) -> bool:
    """Whether the policy chooses one action in every state, and another one is better on average."""
    first = int(chosen[0])
    return bool((chosen == first).all() and table[:, first].mean() < table.mean(0).max())


def each_action(table: np.ndarray, chosen: np.ndarray, actions: Sequence[Action]) -> list[dict[str, Any]]:
    """Of every action: what it is, its mean reward as above, and in how many states the policy chooses it."""
    return [
        {"steps": action.steps, "a": action.guidance.a, "b": action.guidance.b}
        | _mean(table[:, index])
        | {"chosen": int((chosen == index).sum())}
        for index, action in enumerate(actions)
    ]


def _mean(values: np.ndarray) -> dict[str, float | None]:
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": float(values.mean()), "error": error}
