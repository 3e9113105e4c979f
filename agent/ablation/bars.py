"""A table of an ablation as bars, as RL-identity's Figures 5 and 6 show theirs: one <svg>. Computes nothing."""

from __future__ import annotations

from html import escape

from agent.ablation.results import MAP, Estimate, Row, TableResult
from agent.ablation.show import SCORES

LABELS, BARS, LINE, PAD = 190, 360, 17, 8  # pixels: widths of labels and bars, height of a bar, between rows
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#1d1f24}.muted{fill:#686d78}.score{fill:#2f6fb3}.second{fill:#8cc6ea}"
    ".paper{stroke:#d9722b;stroke-width:2}.error{stroke:#1d1f24}.sheet{fill:#fff}"
    "@media(prefers-color-scheme:dark){text{fill:#e8e9ec}.muted{fill:#9aa0ad}.error{stroke:#e8e9ec}.sheet{fill:#14161a}}"
)


def svg(table: TableResult, headline: str) -> str:
    """Each row's score, and beside mAP Rank-1, with its standard error, and the paper's where it prints one.

    The axis begins a little below the lowest of them, which is said.
    """
    both = headline == MAP
    values = [value for row in table.rows for value in _values(row, both)]
    lowest = max(0.0, 10 * int(min(values, default=0.0) / 10 - 0.5))
    highest = max([lowest + 1, *values])
    parts, top = [], 34
    for row in table.rows:
        parts.append(f'<text x="{LABELS - PAD}" y="{top + 12}" text-anchor="end">{escape(row.label)}</text>')
        numbers = [("score", row.score, row.paper.score if row.paper else None)]
        numbers += [("second", row.second, row.paper.second if row.paper else None)] if both else []
        for kind, estimate, printed in numbers:
            parts.append(_bar(kind, estimate, printed, top, lowest, highest))
            top += LINE
        top += PAD
    names = f"{SCORES[headline]}{' (dark), Rank-1 (light)' if both else ''}"
    title = f"{names}, %; from {lowest:g} on{'; lines: the paper' if _printed(table) else ''}"
    width = LABELS + BARS + 120
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {top}" role="img">'
        f"<title>{escape(table.title)}</title><style>{STYLE}</style>"
        f'<rect class="sheet" width="{width}" height="{top}"/>'
        f'<text class="muted" x="{LABELS}" y="18">{escape(title)}</text>{"".join(parts)}</svg>\n'
    )


def _bar(kind: str, estimate: Estimate | None, printed: float | None, top: float, lowest: float, highest: float) -> str:
    def x(percent: float) -> float:
        return LABELS + BARS * (max(percent, lowest) - lowest) / (highest - lowest)

    text = ""
    if estimate is None:
        text = f'<text class="muted" x="{LABELS}" y="{top + 12}">not done</text>'
    else:
        mean, middle = 100 * estimate.mean, top + (LINE - 3) / 2
        text = f'<rect class="{kind}" x="{LABELS}" y="{top}" width="{x(mean) - LABELS:.1f}" height="{LINE - 3}"/>'
        end, told = x(mean), f"{mean:.1f}"
        if estimate.standard_error is not None:
            error = 100 * estimate.standard_error
            end, told = x(mean + error), f"{told} ± {error:.1f}"
            text += f'<path class="error" d="M{x(mean - error):.1f} {middle}H{end:.1f}"/>'
        text += f'<text x="{end + 6:.1f}" y="{top + 12}">{told}</text>'
    if printed is not None:
        text += f'<path class="paper" d="M{x(printed):.1f} {top}v{LINE - 3}"/>'
    return text


def _values(row: Row, both: bool) -> list[float]:
    """What the axis must hold, in percent."""
    estimates = [row.score, row.second] if both else [row.score]
    found = [100 * estimate.mean for estimate in estimates if estimate is not None]
    found += [100 * (e.mean + (e.standard_error or 0.0)) for e in estimates if e is not None]
    if row.paper is not None:
        found += [value for value in ([row.paper.score, row.paper.second] if both else [row.paper.score]) if value]
    return found


def _printed(table: TableResult) -> bool:
    return any(row.paper is not None for row in table.rows)
