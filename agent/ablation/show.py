"""An ablation's result as text: the same cells on the terminal and in Markdown. Computes nothing."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.table import Table

from agent.ablation.paper import Cell
from agent.ablation.results import (
    DISTANCES,
    MAP,
    STAGES,
    TOP1,
    UAR,
    VERIFICATION,
    Estimate,
    Result,
    Row,
    TableResult,
)

SCORES = {TOP1: "top-1", MAP: "mAP", VERIFICATION: "verification", UAR: "UAR"}
SECONDS = {MAP: "Rank-1, %", UAR: "WAR, %"}  # headline -> what stands beside it, where that is in percent
ARGEN = "argen-"  # how names of its tables begin
FIGURES = {"figure-5": "Figure 5", "figure-6": "Figure 6"}  # tables that are shown as bars, too
NONE = "-"


def markdown(result: Result) -> str:
    """The whole of `ablation.md`."""
    parts = [f"# Ablation of {result.recipe}\n\n{_intro(result)}\n"]
    for name, table in result.tables.items():
        header, cells = _header(table, result), [_cells(row, table, result) for row in table.rows]
        lines = [header, ["---"] + ["---:"] * (len(header) - 1), *cells]
        grid = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        grid += f"\n\n![{table.title}]({picture(name)})" if name in FIGURES else ""
        parts.append(f"## {_title(name, table)}\n\n{grid}\n" + "".join(f"\n* {note}" for note in notes(table)))
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def terminal(result: Result) -> Iterator[Table | str]:
    """What to print, in its order."""
    yield _intro(result)
    for name, table in result.tables.items():
        shown = Table(title=_title(name, table), title_justify="left", box=box.SIMPLE_HEAD)
        for column in _header(table, result):
            shown.add_column(column, justify="right" if column else "left", no_wrap=not column)
        for row in table.rows:
            shown.add_row(*_cells(row, table, result))
        yield shown
        yield from notes(table)


def notes(table: TableResult) -> list[str]:
    """What a reader of the table has to know."""
    found = []
    for row in table.rows:
        found += [f"{row.label}, seed {seed}: failed: {reason}" for seed, reason in row.failed.items()]
        if row.missing:
            found.append(f"{row.label}: {row.missing} synthetic samples that were asked for never came")
    for arm in dict.fromkeys(row.arm for row in table.rows):
        alike = [row.label for row in table.rows if row.arm == arm]
        if len(alike) > 1:
            found.append(f"{' and '.join(alike)}: one run, as this recipe sets them alike")
    if any(row.paper and row.paper.measured_deviation for row in table.rows):
        found.append("sFVD and tFVD: the paper's ± is over the groups of clips, ours over seeds")
    return found


def _intro(result: Result) -> str:
    seeds = ", ".join(map(str, result.seeds))
    paper = f" The paper's numbers are for {result.dataset}." if result.dataset else ""
    gain = "Gains are over real data only, of the same backbone and seed, in points ± standard error"
    return f"Seeds {seeds}; {result.effort}. {gain}. Hours are of one device.{paper}"


def picture(table: str) -> str:
    """File of the bars of a table, beside `ablation.md`."""
    return f"{table}.svg"


def _title(name: str, table: TableResult) -> str:
    number = f"Table {name}: " if name.isdecimal() else f"{FIGURES[name]}: " if name in FIGURES else ""
    number = f"ARGen Table {name.removeprefix(ARGEN)}: " if name.startswith(ARGEN) else number
    return f"{number}{table.title} (mean ± {table.spread})"


def _header(table: TableResult, result: Result) -> list[str]:
    score, second = SCORES[result.headline], SECONDS.get(result.headline, "worst/best")
    columns = [name if name in DISTANCES else f"{name}, %" for name in table.columns]
    own = ["", f"{score}, %", "gain", second, *columns, "n", f"hours: {', '.join(STAGES)}"]
    if not result.dataset:
        return own
    return [*own, f"paper: {score}", second, *(f"paper: {name}" for name in _printed_columns(table))]


def _printed_columns(table: TableResult) -> list[str]:
    """The columns that the paper prints of this table."""
    return [name for name in table.columns if any(row.paper and name in row.paper.measured for row in table.rows)]


def _cells(row: Row, table: TableResult, result: Result) -> list[str]:
    n = row.score.n if row.score else 0
    form, scale = ("{:.1f}", 100) if result.headline in SECONDS else ("{:.2f}", 1)
    cells = [
        row.label,
        _estimate(row.score, table.spread, "{:.1f}", 100),
        _gain(row),
        _estimate(row.second, table.spread, form, scale),
        *(_measured(row, name, table.spread) for name in table.columns),
        str(n) if n or not row.failed else "failed",
        ", ".join(f"{row.hours[stage]:.2g}" if stage in row.hours else NONE for stage in STAGES),
    ]
    if not result.dataset:
        return cells
    return [*cells, *_printed(row.paper, form), *(_printed_beside(row.paper, name) for name in _printed_columns(table))]


def _measured(row: Row, column: str, spread: str) -> str:
    found = row.measured.get(column)
    return _estimate(found, spread, "{:.2f}") if column in DISTANCES else _estimate(found, spread, "{:.1f}", 100)


def _printed_beside(cell: Cell | None, column: str) -> str:
    if cell is None or column not in cell.measured:
        return NONE
    deviation = cell.measured_deviation.get(column)
    return f"{cell.measured[column]:.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")


def _gain(row: Row) -> str:
    """With its number of pairs, where that is not the row's n."""
    text = _estimate(row.gain, "standard error", "{:+.1f}", 100)
    if row.gain is None or row.score is None or row.gain.n == row.score.n:
        return text
    return f"{text} (n = {row.gain.n})"


def _estimate(estimate: Estimate | None, spread: str, form: str, scale: float = 1) -> str:
    if estimate is None:
        return NONE
    mean = form.format(scale * estimate.mean)
    around = estimate.standard_error if spread == "standard error" else estimate.standard_deviation
    return mean if around is None else f"{mean} ± {form.replace('+', '').format(scale * around)}"


def _printed(cell: Cell | None, form: str) -> tuple[str, str]:
    """The paper's score and what stands beside it. `form`: of the latter."""
    if cell is None or cell.score is None:
        return NONE, NONE
    score = f"{cell.score:.1f}" if round(cell.score, 1) == cell.score else f"{cell.score:.2f}"
    score += f" ± {cell.score_deviation:.2f}" if cell.score_deviation is not None else ""
    if cell.second is None:
        return score, NONE
    deviation = f" ± {cell.second_deviation:.2f}" if cell.second_deviation is not None else ""
    return score, f"{form.format(cell.second)}{deviation}"
