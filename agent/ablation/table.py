"""What an ablation is made of: arms, and the tables that set them side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Changes = Mapping[str, Any]  # of an arm: "table.key" -> value, laid over the recipe

BASELINE = "real-only"


@dataclass(frozen=True)
class Table:
    """One table: its rows in order, each a label, as the paper prints it, and the arm that fills it."""

    title: str
    rows: tuple[tuple[str, str], ...]
    spread: Literal["standard error", "standard deviation"] = "standard error"
    distances: bool = False  # what the paper prints of it are Frechet distances
    over: Mapping[str, str] = field(default_factory=dict)  # arm -> the arm that its gain is over, if not the baseline
