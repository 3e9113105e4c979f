"""The report's section on the synthetic clips themselves: how far they are from real ones of their classes (ARGen
Tables 1, 4 and 5), and how much they differ from each other (its Table 8).

Knows the last line of a run's metrics. Every text from the run is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from trainer.record import Record
from trainer.report.identity import table
from trainer.report.words import ABSENT, count

GROUPS = {"sFVD, by subject": "sfvd", "tFVD, by class": "tfvd"}
CAPTION = (
    "Less is better of FVD, more of diversity. sFVD and tFVD are means over groups of clips ± their standard "
    "deviation; distances of other feature networks cannot be compared with them."
)


def section(record: Record, baselines: Sequence[Record]) -> str | None:
    """None: the run did not measure its clips."""
    last, runs = _last(record), [*baselines, record]
    if not {"fvd", "diversity"} & last.keys():
        return None
    rows: dict[str, list[str]] = {}
    if "fvd" in last:
        rows["FVD"] = [_number(_last(run).get("fvd")) for run in runs]
        rows |= {told: [_spread(_last(run).get(name)) for run in runs] for told, name in GROUPS.items()}
    if "diversity" in last:
        found = [_last(run).get("diversity") or {} for run in runs]
        rows["Diversity"] = [_number(one.get("mean"), 3) for one in found]
        for name in last["diversity"]["classes"]:
            rows[f"Diversity of {name}"] = [_number(one.get("classes", {}).get(name), 3) for one in found]
    return table(rows, runs, CAPTION) + _notes(last)


def _notes(last: Mapping[str, Any]) -> str:
    """Which network it was, and which groups could not be measured."""
    told = [f"Distances are in the features of {last['fvd_features']}."] if "fvd" in last else []
    for name in ("sfvd", "tfvd"):
        if (groups := last.get(name)) and groups["left_out"]:
            told.append(
                f"{name[0]}FVD leaves out {count(len(groups['left_out']))} groups that lack two clips on a side."
            )
    return f'<p class="note">{escape(" ".join(told))}</p>' if told else ""


def _last(record: Record) -> Mapping[str, Any]:
    return record.metrics[-1] if record.metrics else {}


def _number(value: float | None, digits: int = 2) -> str:
    return ABSENT if value is None else f"{value:,.{digits}f}"


def _spread(groups: Mapping[str, Any] | None) -> str:
    if groups is None or groups["mean"] is None:
        return ABSENT
    around = "" if groups["deviation"] is None else f" ± {groups['deviation']:,.2f}"
    return f"{groups['mean']:,.2f}{around}"
