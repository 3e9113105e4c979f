"""The numbers of the papers' own tables and figures, from `paper.toml` beside this file."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files
from typing import Any

from pydantic import BaseModel


class Cell(BaseModel):
    """One cell as printed: a mean of one seed, or of several with its standard deviation."""

    score: float  # percent: top-1, mAP, or accuracy of verification
    score_deviation: float | None = None
    second: float | None = None  # lowest over highest class accuracy, or beside mAP Rank-1 in percent
    second_deviation: float | None = None


def cell(table: str, row: str, dataset: str | None) -> Cell | None:
    """What the paper prints there; None: it has no such table, row or column."""
    printed = _tables().get(table, {}).get(row)
    if printed is None or dataset is None:
        return None
    columns = _tables()[table].get("datasets", _tables()["datasets"])
    cells = dict(zip(columns, printed.split(), strict=False))  # some tables have the first few data sets alone
    return _parsed(cells[dataset]) if dataset in cells else None


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
