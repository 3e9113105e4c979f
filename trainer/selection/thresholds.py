"""How many samples to ask for and how many to drop: fixed, or learnt while the run goes on.

GenDataAgent sets both by hand for each dataset (Tables 9 and 10) and leaves their choice to future work (limitations).
Here each is the arm of a bandit of its own, which UCB1 (Auer et al. 2002) pulls once an iteration: the iteration's gain
on held-out samples is credited to the part that was dropped in it, and to the part that was asked for when its samples
were. Two bandits learn from twenty iterations what one over all pairs could not; that the two parts add up is an
assumption. Gains shrink as a run converges, which favours what is tried first: value a logarithm of the loss, whose
gains are relative.

Decides only: how samples are scored, and what is held out, is not known here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class FixedThresholds:
    """The parts that the settings name."""

    asked: float
    dropped: float

    def ask(self, iteration: int) -> float:
        """Part of the real samples to ask for in an iteration's feedback."""
        return self.asked

    def drop(self, iteration: int) -> float:
        """Part of an iteration's candidates that the filter drops."""
        return self.dropped

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Bandit:
    """UCB1 over a few values. A pull whose gain is not known yet counts as one of gain 0.

    Args:
        exploration: c of the bound, in units of the gain: mean + c sqrt(2 ln t / n). 0 takes the best mean once each
            value was tried; the larger, the more often the others are tried again.
    """

    def __init__(self, values: Sequence[float], exploration: float):
        self.values, self.exploration = tuple(values), exploration
        self.pulls = [0] * len(values)
        self.gains = [0.0] * len(values)  # sum over the pulls

    def pull(self) -> int:
        """The arm to try now: first each once, in order; then the highest bound, of equal ones the first."""
        arm = self.pulls.index(0) if 0 in self.pulls else max(range(len(self.values)), key=self._bound)
        self.pulls[arm] += 1
        return arm

    def _bound(self, arm: int) -> float:
        pulls = self.pulls[arm]
        return self.gains[arm] / pulls + self.exploration * math.sqrt(2.0 * math.log(sum(self.pulls)) / pulls)


class LearntThresholds:
    """Both parts, learnt.

    Args:
        asked: parts of the real samples to try. dropped: parts of the candidates to try.
        exploration: as in `Bandit`.
        first: the first iteration of stage 2. staleness: K; an iteration's samples come from feedback K earlier.
    """

    def __init__(
        self, asked: Sequence[float], dropped: Sequence[float], exploration: float, *, first: int, staleness: int
    ):
        self._ask, self._drop = Bandit(asked, exploration), Bandit(dropped, exploration)
        self._first, self._staleness = first, staleness
        self._value: float | None = None  # on the held-out samples, after the latest iteration
        self._asked: dict[int, int] = {}  # feedback -> arm, whose gain is not known yet
        self._dropped: dict[int, int] = {}  # iteration -> arm, likewise

    def ask(self, iteration: int) -> float:
        """As in `FixedThresholds`. Nothing is tried before the feedback that stage 2 begins with."""
        if iteration < self._first - self._staleness:
            return self._ask.values[0]
        if iteration not in self._asked:
            self._asked[iteration] = self._ask.pull()
        return self._ask.values[self._asked[iteration]]

    def drop(self, iteration: int) -> float:
        """As in `FixedThresholds`."""
        if iteration not in self._dropped:
            self._dropped[iteration] = self._drop.pull()
        return self._drop.values[self._dropped[iteration]]

    def credit(self, iteration: int, value: float) -> dict[str, float]:
        """An iteration is over: credit what it gained.

        Args:
            value: how good the model is now on the held-out samples; higher is better.

        Returns:
            The numbers of the iteration by name; those of stage 2 are only there in stage 2.
        """
        gain, self._value = value - (value if self._value is None else self._value), value
        told = {"held_out_value": value, "held_out_gain": gain}
        pulled = [
            ("asked_part", self._ask, self._asked.pop(iteration - self._staleness, None)),
            ("dropped_part", self._drop, self._dropped.pop(iteration, None)),
        ]
        for name, bandit, arm in pulled:
            if arm is not None:
                bandit.gains[arm] += gain
                told[name] = bandit.values[arm]
        return told

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {
            "value": self._value,
            "asked": dict(self._asked),
            "dropped": dict(self._dropped),
            "bandits": [[list(bandit.pulls), list(bandit.gains)] for bandit in (self._ask, self._drop)],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a checkpoint."""
        self._value, self._asked, self._dropped = state["value"], dict(state["asked"]), dict(state["dropped"])
        for bandit, (pulls, gains) in zip((self._ask, self._drop), state["bandits"], strict=True):
            bandit.pulls, bandit.gains = list(pulls), list(gains)
