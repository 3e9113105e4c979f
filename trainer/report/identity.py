"""The report's section of runs that tell identities apart: mAP, Rank-k and the CMC curve, or verification by pairs with
its groups, each beside the baselines'.

Knows the last line of a run's metrics. Every text from the run is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from trainer.record import Record
from trainer.report.svg import COLOURS, SMALL, legend, svg
from trainer.report.words import ABSENT, percent

RANKS = {"mAP": "mAP", "rank1": "Rank-1", "rank5": "Rank-5", "rank10": "Rank-10"}  # field of the metrics -> name
MOST_RANKS = 20  # of the CMC curve that are drawn
AVERAGES = {"group_average": "average of the groups", "group_gap": "best minus worst"}


def section(record: Record, baselines: Sequence[Record]) -> str | None:
    """None: the run does not tell identities apart, or has measured nothing yet."""
    runs = [*baselines, record]
    last = _last(record)
    if "mAP" in last:
        return f'<div class="charts">{_card(cmc(runs))}{table(_retrieval(runs), runs)}</div>{_asked(record, last)}'
    if "verification" in last:
        parts = table(_sets(runs), runs, "Accuracy of verification over ten folds, ± standard deviation of a fold.")
        groups = _groups(runs)
        bias = table(groups, runs, "The bias table: accuracy for each group of people.") if groups else ""
        return f'<div class="charts">{parts}{bias}</div>{_bias(last)}'
    return None


def cmc(runs: Sequence[Record]) -> str:
    """Part of the queries with a match among the first k, by k; the last run is the report's own."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.set_title("Cumulative matching (CMC)")
        axes.set_xlabel("rank")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for run in runs:
            curve = _last(run).get("cmc", [])[:MOST_RANKS]
            own = run is runs[-1]
            look = {"color": COLOURS["test" if own else "muted"], "linestyle": "-" if own else "--", "marker": "o"}
            if curve:
                axes.plot(range(1, len(curve) + 1), curve, label=run.config.run, **look)
        legend(axes)

    return svg("cmc", "Part of the queries with a match among the first ranks", SMALL, draw)


def _last(record: Record) -> Mapping[str, Any]:
    return record.metrics[-1] if record.metrics else {}


def _retrieval(runs: Sequence[Record]) -> dict[str, list[str]]:
    return {name: [percent(_last(run).get(field)) for run in runs] for field, name in RANKS.items()}


def _asked(record: Record, last: Mapping[str, Any]) -> str:
    """How many queries there were, and by which protocol."""
    told = f"{last['queries']} queries" if "queries" in last else "Queries"
    excluded = record.config.model.get("camera_exclusion", True)
    told += ", pictures by a query's own camera passed over" if excluded else ", whatever camera took a picture"
    without, by = last.get("queries_without_match", 0), " that another camera took" if excluded else ""
    left = f"; {without} more have no match{by}, and are left out" if without else ""
    return f'<p class="note">{told}{left}.</p>'


def _sets(runs: Sequence[Record]) -> dict[str, list[str]]:
    """Each set of pairs, groups left out, and the mean."""
    found = [_last(run).get("verification_sets", {}) for run in runs]
    grouped = {pairs["name"] for run in runs for pairs in run.config.model.get("pairs", []) if pairs.get("group")}
    names = [name for name in dict.fromkeys(name for sets in found for name in sets) if name not in grouped]
    rows = {name: [_accuracy(sets.get(name)) for sets in found] for name in names}
    return rows | {"Mean": [percent(_last(run).get("verification")) for run in runs]}


def _accuracy(one: Mapping[str, float] | None) -> str:
    return ABSENT if one is None else f"{100 * one['accuracy']:.1f} ± {100 * one['deviation']:.1f} %"


def _groups(runs: Sequence[Record]) -> dict[str, list[str]]:
    found = [_last(run).get("verification_groups", {}) for run in runs]
    names = dict.fromkeys(name for groups in found for name in groups)
    rows = {name: [percent(groups.get(name)) for groups in found] for name in names}
    averages = {name: [percent(_last(run).get(field)) for run in runs] for field, name in AVERAGES.items()}
    return rows | {name.capitalize(): values for name, values in averages.items()} if rows else {}


def _bias(last: Mapping[str, Any]) -> str:
    if "group_worst" not in last:
        return ""
    gap = f"{100 * last['group_gap']:.1f} points"
    worst, best = escape(last["group_worst"]), escape(last["group_best"])
    return f'<p class="note">Recognised worst are {worst}, best {best}: {gap} apart.</p>'


def table(rows: Mapping[str, Sequence[str]], runs: Sequence[Record], caption: str = "") -> str:
    """One line a row, one column a run, the last the report's own."""
    told = f"<caption>{escape(caption)}</caption>" if caption else ""
    head = "".join(f'<th scope="col">{escape(run.config.run)}</th>' for run in runs)
    body = "".join(
        f'<tr><th scope="row">{escape(label)}</th>'
        + "".join(f"<td>{value}</td>" for value in values[:-1])
        + f'<td class="own">{values[-1]}</td></tr>'
        for label, values in rows.items()
    )
    return f'<div class="card"><table>{told}<thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _card(drawn: str) -> str:
    return f'<figure class="card"><div class="drawn">{drawn}</div></figure>'
