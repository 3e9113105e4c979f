"""The numbers of the paper's own tables, from `paper.toml` beside this file."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files
from typing import Any

from pydantic import BaseModel


class Cell(BaseModel):
    """One cell as printed: a mean of one seed, or of several with its standard deviation."""

    top1: float  # percent
    top1_deviation: float | None = None
    disparity: float | None = None  # lowest over highest class accuracy
    disparity_deviation: float | None = None


def cell(table: str, row: str, dataset: str | None) -> Cell | None:
    """What the paper prints there; None: it has no such table, row or column."""
    printed = _tables().get(table, {}).get(row)
    if printed is None or dataset is None:
        return None
    cells = dict(zip(datasets(), printed.split(), strict=False))  # some tables have the first few data sets alone
    return _parsed(cells[dataset]) if dataset in cells else None


def datasets() -> list[str]:
    """The data sets of the paper, as its tables call them, in their order."""
    return _tables()["datasets"]


@cache
def _tables() -> dict[str, Any]:
    return tomllib.loads((files("agent.ablation") / "paper.toml").read_text())


def _parsed(text: str) -> Cell:
    top1, _, disparity = (number.partition("+-") for number in text.partition("/"))
    return Cell(
        top1=float(top1[0]),
        top1_deviation=float(top1[2]) if top1[2] else None,
        disparity=float(disparity[0]) if disparity[0] else None,
        disparity_deviation=float(disparity[2]) if disparity[2] else None,
    )
