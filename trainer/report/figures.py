"""The report's charts, as inline SVG that takes its colours from the page (light or dark).

Knows a run's record; nothing of HTML beyond one <svg> element.
"""

from __future__ import annotations

import io
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from html import escape

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from trainer.record import Record, Row
from trainer.summary import Span, spans

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
        ),
        start=1,
    )
}
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "onthefly",  # the same run gives the same page
    "text.parse_math": False,  # a class may be called "$x$"
    "font.size": 9,
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
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.8,
    "lines.markersize": 3.5,
}
MOST_CLASSES = 24  # shown in the chart of classes
ACTIVITIES = {  # the trainer's, in the order of an iteration, and how the legend calls them
    "score": "score real samples",
    "wait": "wait",
    "vog": "variance of gradients",
    "train": "train",
    "evaluate": "evaluate",
    "save": "save",
}


def accuracy(record: Record, baselines: Sequence[Record]) -> str:
    """Top-1 by iteration: held out, training set, synthetic; held out of the baselines."""

    def draw(figure: Figure) -> None:
        axes = _iterations(figure, record, "Top-1 accuracy")
        _line(axes, record.metrics, "test_top1", "held out", COLOURS["test"])
        for baseline in baselines:
            label = f"held out, {baseline.config.run}"
            _line(axes, baseline.metrics, "test_top1", label, COLOURS["muted"], linestyle="--")
        _line(axes, record.metrics, "train_top1", "training set", COLOURS["real"], linestyle=":")
        _line(axes, record.metrics, "synthetic_top1", "synthetic samples", COLOURS["synthetic"])
        _legend(axes)

    return _svg("accuracy", "Top-1 accuracy by iteration, with and without the synthetic samples", (5.4, 3.2), draw)


def losses(record: Record) -> str:
    """Mean training loss of real and of synthetic rows, by iteration."""
    return _pair("losses", "Training loss", record, "loss_real", "loss_synthetic")


def gradients(record: Record) -> str:
    """Mean gradient norm of real and of synthetic rows, by iteration (GenDataAgent Figure 6b)."""
    return _pair("gradients", "Gradient magnitude", record, "gradient_real", "gradient_synthetic")


def counts(record: Record) -> str:
    """What became of the samples that each iteration was given."""
    kept = Counter(row["iteration"] + 1 for row in record.selection if row["kept"])
    dropped = Counter(row["iteration"] + 1 for row in record.selection if row["fate"] == "vog")

    def draw(figure: Figure) -> None:
        axes = _iterations(figure, record, "Synthetic samples")
        numbers = [row["iteration"] + 1 for row in record.metrics]
        below = [kept[number] for number in numbers]
        axes.bar(numbers, below, 0.7, color=COLOURS["test"], label="trained on")
        above = [dropped[number] for number in numbers]
        axes.bar(numbers, above, 0.7, bottom=below, color=COLOURS["bad"], label="dropped by variance of gradients")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(bottom=0)
        axes.grid(axis="x", visible=False)
        _legend(axes)

    return _svg("counts", "Synthetic samples trained on and dropped, by iteration", (5.4, 3.2), draw)


def _pair(name: str, title: str, record: Record, real: str, synthetic: str) -> str:
    def draw(figure: Figure) -> None:
        axes = _iterations(figure, record, title)
        _line(axes, record.metrics, real, "real", COLOURS["real"])
        _line(axes, record.metrics, synthetic, "synthetic", COLOURS["synthetic"])
        axes.set_ylim(bottom=0)
        _legend(axes)

    return _svg(name, f"{title} of real and synthetic samples by iteration", (5.4, 3.2), draw)


def classes(record: Record, names: Sequence[str]) -> str:
    """For each class: how many synthetic samples it was trained on, and its accuracy before and after.

    Args:
        names: label -> class name.
    """
    after = record.metrics[-1]["per_class"]
    before = record.metrics[max(record.config.warmup_iterations - 1, 0)]["per_class"] if _staged(record) else after
    made = Counter(row["class"] for row in record.selection if row["kept"])
    weakest = sorted((label for label, value in enumerate(after) if value is not None), key=lambda c: before[c] or 0)
    shown = weakest[:MOST_CLASSES][::-1]
    rows = range(len(shown))

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        bars = [made[names[label]] for label in shown]
        left.barh(rows, bars, color=COLOURS["synthetic"], height=0.62)
        left.set_xlim(0, 1.05 * max(1, *bars))
        left.set_title("Synthetic samples trained on")
        left.set_yticks(rows, [names[label] for label in shown])
        left.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        for row, label in zip(rows, shown, strict=True):
            right.plot([before[label], after[label]], [row, row], color=COLOURS["muted"], linewidth=1)
        first = "at the end of warm-up" if _staged(record) else "now"
        right.plot([before[c] for c in shown], rows, "o", color=COLOURS["muted"], fillstyle="none", label=first)
        right.plot([after[c] for c in shown], rows, "o", color=COLOURS["test"], label="at the end")
        right.set_title("Accuracy, held out")
        figure.legend(loc="outside lower right", ncols=2)
        left.set_ylabel("class")
        for axes in (left, right):
            axes.tick_params(length=0)

    height = 1.2 + 0.24 * len(shown)
    return _svg("classes", "Synthetic samples and accuracy of each class, weakest first", (11, height), draw)


def timeline(record: Record) -> str:
    """Who did what when, in two lanes: the trainer's activities and the generators' batches."""
    start = min(row["start"] for row in record.trace)
    end = max(max(row["end"] for row in record.trace), start + 1e-3)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for what in ACTIVITIES:
            _lane(axes, 1, spans(record.intervals("trainer", what)), start, end, what, ACTIVITIES[what])
        made = record.intervals("generator", "generate")
        for alternate, (label, alpha) in enumerate((("generate", 1.0), ("", 0.6))):
            batches = [row for row in made if (row["feedback"] - made[0]["feedback"]) % 2 == alternate]
            _lane(axes, 0, spans(batches), start, end, "generate", label, alpha)
        axes.set_yticks([0, 1], ["generator", "trainer"])
        axes.set_ylim(-0.55, 1.55)
        axes.set_xlim(0, end - start)
        axes.set_xlabel("seconds")
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=6, handlelength=1, columnspacing=1.4)

    return _svg("timeline", "When the trainer and the generator worked, and when the trainer waited", (11, 2.5), draw)


def _lane(axes: Axes, lane: int, busy: list[Span], start: float, end: float, kind: str, label: str, alpha=1.0) -> None:
    """Bars of one kind; those too thin to be told apart are joined, so that a long run stays a small picture."""
    resolution = (end - start) / 3000
    joined: list[Span] = []
    for first, last in busy:
        if joined and first - joined[-1][1] < resolution:
            joined[-1] = (joined[-1][0], last)
        else:
            joined.append((first, last))
    if joined:
        bars = [(first - start, max(last - first, resolution)) for first, last in joined]
        colour = COLOURS[kind]
        axes.broken_barh(bars, (lane - 0.36, 0.72), facecolor=colour, linewidth=0, label=label, alpha=alpha)


# ---------------------------------------------------------------- parts


def _iterations(figure: Figure, record: Record, title: str) -> Axes:
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


def _line(axes: Axes, metrics: Sequence[Row], name: str, label: str, colour: str, linestyle: str = "-") -> None:
    points = [(row["iteration"] + 1, row[name]) for row in metrics if row.get(name) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, color=colour, linestyle=linestyle, marker="o")


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, handlelength=1.6, columnspacing=1.2)


def _staged(record: Record) -> bool:
    """Whether stage 2 has begun: there is a before and an after."""
    return len(record.metrics) > record.config.warmup_iterations


def _svg(name: str, alt: str, size: tuple[float, float], draw: Callable[[Figure], None]) -> str:
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
