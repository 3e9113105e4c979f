"""The numbers of the papers' own tables and figures, from `paper.toml` beside this file."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files
from typing import Any

from pydantic import BaseModel


class Cell(BaseModel):
    """One cell as printed: a mean of one seed, or of several with its standard deviation. None: not printed."""

    score: float | None  # percent: top-1, mAP, accuracy of verification, or UAR
    score_deviation: float | None = None
    second: float | None = None  # lowest over highest class accuracy; in percent beside mAP Rank-1, beside UAR WAR
    second_deviation: float | None = None
    measured: dict[str, float] = {}  # by column: recall of a class in percent, FVD; sFVD and tFVD, over groups
    measured_deviation: dict[str, float] = {}  # of those over groups


def cell(table: str, row: str, dataset: str | None) -> Cell | None:
    """What the paper prints there; None: it has no such table, row or column."""
    printed = _tables().get(table, {}).get(row)
    if printed is None or dataset is None:
        return None
    columns = _tables()[table].get("datasets", _tables()["datasets"])
    cells = dict(zip(columns, printed.split(), strict=False))  # some tables have the first few data sets alone
    if dataset not in cells:
        return None
    named = _tables()[table].get("columns")
    return (
        _parsed(cells[dataset])
        if named is None
        else _by_column(dict(zip(named, cells[dataset].split("/"), strict=True)))
    )


def datasets() -> list[str]:
    """The data sets of the papers, as their tables call them, in their order."""
    own = [table["datasets"] for table in _tables().values() if "datasets" in table]
    return list(dict.fromkeys([*_tables()["datasets"], *(name for names in own for name in names)]))


@cache
def _tables() -> dict[str, Any]:
    return tomllib.loads((files("agent.ablation") / "paper.toml").read_text())


def _parsed(text: str) -> Cell:
    score, _, second = (number.partition("+-") for number in text.partition("/"))
    return Cell(
        score=float(score[0]),
        score_deviation=float(score[2]) if score[2] else None,
        second=float(second[0]) if second[0] else None,
        second_deviation=float(second[2]) if second[2] else None,
    )


def _by_column(printed: dict[str, str]) -> Cell:
    numbers = {name: [float(part) for part in text.split("+-")] for name, text in printed.items()}
    others = {name: value for name, value in numbers.items() if name not in ("UAR", "WAR")}
    return Cell(
        score=numbers["UAR"][0] if "UAR" in numbers else None,
        second=numbers["WAR"][0] if "WAR" in numbers else None,
        measured={name: value[0] for name, value in others.items()},
        measured_deviation={name: value[1] for name, value in others.items() if len(value) > 1},
    )
