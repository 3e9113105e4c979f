"""Where a run is, and the running sums of the iteration it is in. Knows nothing of models or of data."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Position:
    """Where the run is, and the running sums of the iteration it is in."""

    iteration: int = 0
    done: int = 0  # batches of this iteration that are done
    updates: int = 0  # optimiser updates in all: the model's version
    kept: list[str] = field(default_factory=list)  # ids of this iteration's synthetic training samples
    scarce: list[str] = field(default_factory=list)  # classes that are scarce in this iteration, by name
    sums: dict[str, float] = field(default_factory=dict)

    def add(self, **amounts: float) -> None:
        for name, amount in amounts.items():
            self.sums[name] = self.sums.get(name, 0.0) + amount

    def mean(self, total: str, count: str) -> float | None:
        """Sum `total` over sum `count`; None when nothing was counted."""
        rows = self.sums.get(count, 0.0)
        return self.sums[total] / rows if rows and total in self.sums else None
