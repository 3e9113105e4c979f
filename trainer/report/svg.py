"""How the report's charts are drawn: matplotlib's output as inline SVG, coloured by the page, light or dark.

Knows the axes of a run's iterations; neither what a chart shows, nor HTML beyond one <svg> element.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from html import escape

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from trainer.record import Record, Row

# Drawn in these colours, each of which stands for a variable of the page's style sheet.
COLOURS = {
    name: f"#{index:02x}0b0d"
    for index, name in enumerate(
        (
            "ink",
            "muted",
            "grid",
            "real",
            "synthetic",
            "test",
            "bad",
            "score",
            "wait",
            "vog",
            "train",
            "evaluate",
            "save",
            "generate",
            "adapt",
            "card",
            "similarity",
            "caption",
            "privacy",
            "publish",
        ),
        start=1,
    )
}
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "onthefly",  # the same run gives the same page
    "text.parse_math": False,  # a class may be called "$x$"
    "font.size": 9.5,
    "text.color": COLOURS["ink"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.edgecolor": COLOURS["grid"],
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLOURS["grid"],
    "grid.linewidth": 0.6,
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.markersize": 3.5,
}
LEGEND_LETTERS = 45  # in three columns, beside their keys
SMALL = (4.6, 3.3)  # inches: legible on a phone, two beside each other on a desk


def svg(name: str, alt: str, size: tuple[float, float], draw: Callable[[Figure], None]) -> str:
    """One inline <svg>: no file header, ids of its own, colours as the page's variables."""
    out = io.StringIO()
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # text is drawn by the reader's browser, with its own fonts
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|font: [^;\"]*; ?", _keep_size, text, flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    text = f'<svg {box[0]} role="img" aria-label="{escape(alt)}">' + text[text.index(">") + 1 :]
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", text).replace("xlink:href", "href")
    for colour, value in COLOURS.items():
        text = text.replace(value, f"var(--{colour})")
    return text


def _keep_size(match: re.Match[str]) -> str:
    """Of a font declaration its size and weight, so that the page's own font is used; of anything else nothing."""
    font = re.match(r"font: (?:(bold|700) )?([\d.]+px)", match[0])
    if font is None:
        return ""
    return f"font-size: {font[2]}; " + ("font-weight: 600; " if font[1] else "")


def iterations(figure: Figure, record: Record, title: str) -> Axes:
    """Axes over the iterations, the warm-up shaded."""
    axes = figure.subplots()
    axes.set_title(title)
    axes.set_xlabel("iteration")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(0.5, max(len(record.metrics), 2) + 0.5)
    warmup = min(record.config.warmup_iterations, len(record.metrics))
    if warmup and record.config.mode != "real":
        axes.axvspan(0.5, warmup + 0.5, color=COLOURS["grid"], alpha=0.45, linewidth=0, label="warm-up (real only)")
    return axes


def line(axes: Axes, metrics: Sequence[Row], name: str, label: str, colour: str, linestyle: str = "-") -> None:
    points = [(row["iteration"] + 1, row[name]) for row in metrics if row.get(name) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, color=colour, linestyle=linestyle, marker="o")


def legend(axes: Axes) -> None:
    labels = axes.get_legend_handles_labels()[1]
    if labels:
        columns = 2 if sum(map(len, labels)) > LEGEND_LETTERS else 3
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.19), ncols=columns, handlelength=1.6, columnspacing=1.2)
