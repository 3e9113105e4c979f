"""The report's section of runs that recognise what clips show: recall of each class, its unweighted and its weighted
mean, on held-out clips and on another set's (ARGen Table 2), and what was taken for what.

Knows the last line of a run's metrics. Every text from the run is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from trainer.record import Record
from trainer.report.identity import table
from trainer.report.words import ABSENT, percent

KINDS = {  # prefix of the fields -> their caption
    "test": "Held-out clips. UAR is the mean recall of the classes, WAR the part of all clips that is recognised.",
    "zero_shot": "Clips of another set, which nothing was learnt from.",
}


def section(record: Record, baselines: Sequence[Record], names: Sequence[str]) -> str | None:
    """None: the run does not measure recalls, or has measured nothing yet.

    Args:
        names: label -> class name.
    """
    runs = [*baselines, record]
    found = [_tables(kind, runs, names) for kind in KINDS if f"{kind}_uar" in _last(record)]
    return f'<div class="charts">{"".join(found)}</div>' if found else None


def _tables(kind: str, runs: Sequence[Record], names: Sequence[str]) -> str:
    """Recalls of each run, and the confusion of the last."""
    last = _last(runs[-1])
    rows = {name.upper(): [percent(_last(run).get(f"{kind}_{name}")) for run in runs] for name in ("uar", "war")}
    scarce = {name for row in runs[-1].metrics for name in row.get("scarce", [])}
    for label, name in enumerate(names):
        told = f"{name} (scarce)" if name in scarce else name
        rows[told] = [percent(_at(_last(run).get(_field(kind, "per_class")), label)) for run in runs]
    if last.get(_field(kind, "by_subject")):
        rows["A subject's clips"] = [_by_subject(_last(run).get(_field(kind, "by_subject"))) for run in runs]
    return table(rows, runs, KINDS[kind]) + _confusion(last.get(_field(kind, "confusion")), names)


def _field(kind: str, name: str) -> str:
    return name if kind == "test" else f"{kind}_{name}"


def _last(record: Record) -> Mapping[str, Any]:
    return record.metrics[-1] if record.metrics else {}


def _at(values: Sequence[float | None] | None, label: int) -> float | None:
    return values[label] if values and label < len(values) else None


def _by_subject(found: Mapping[str, float] | None) -> str:
    if found is None:
        return ABSENT
    return f"{100 * found['mean']:.1f} ± {100 * found['deviation']:.1f} % of {found['subjects']}"


def _confusion(counts: Sequence[Sequence[int]] | None, names: Sequence[str]) -> str:
    """What was taken for what; classes that neither occur nor are found are left out."""
    if not counts:
        return ""
    shown = [label for label, row in enumerate(counts) if sum(row) or any(other[label] for other in counts)]
    head = "".join(f'<th scope="col">{escape(names[label])}</th>' for label in shown)
    body = "".join(
        f'<tr><th scope="row">{escape(names[label])}</th>'
        + "".join(f"<td{' class=own' if label == other else ''}>{counts[label][other]}</td>" for other in shown)
        + "</tr>"
        for label in shown
    )
    caption = "<caption>Each line is a class, each column what its clips were taken for.</caption>"
    return (
        f'<div class="card"><table>{caption}<thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )
