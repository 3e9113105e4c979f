"""The report's charts of any run: curves by iteration, classes, and who worked when.

Knows a run's record; nothing of HTML beyond one <svg> element. The paper's own figures are in `paper`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from trainer.record import Record
from trainer.report.svg import COLOURS, SMALL, iterations, legend, line, svg
from trainer.report.words import FILTERS, begun, score
from trainer.spans import Span, spans
from trainer.summary import headline_of

MOST_CLASSES = 24  # shown in the chart of classes
ACTIVITIES = {  # the trainer's, in the order of an iteration, and how the legend calls them
    "score": "score real samples",
    "wait": "wait",
    "privacy": "nearness to real samples",
    **FILTERS,
    "train": "train",
    "evaluate": "evaluate",
    "save": "save",
    "publish": "publish the model",
}


def accuracy(record: Record, baselines: Sequence[Record]) -> str:
    """The main figure by iteration, held out, of the run and its baselines; beside mAP Rank-1, beside top-1 accuracy
    that of the training set and of synthetic samples."""
    headline = (headline_of(record.metrics[-1]) if record.metrics else None) or "test_top1"
    title = begun(score(headline))

    def draw(figure: Figure) -> None:
        axes = iterations(figure, record, title)
        line(axes, record.metrics, headline, "held out", COLOURS["test"])
        for baseline in baselines:
            label = f"held out, {baseline.config.run}"
            line(axes, baseline.metrics, headline, label, COLOURS["muted"], linestyle="--")
        if headline == "test_top1":
            line(axes, record.metrics, "train_top1", "training set", COLOURS["real"], linestyle=":")
            line(axes, record.metrics, "synthetic_top1", "synthetic samples", COLOURS["synthetic"])
        line(axes, record.metrics, "rank1", "Rank-1, held out", COLOURS["evaluate"], linestyle="-.")
        legend(axes)

    alt = "with and without the synthetic samples" if headline == "test_top1" else "held out"
    return svg("accuracy", f"{title} by iteration, {alt}", SMALL, draw)


def losses(record: Record) -> str:
    """Mean training loss of real and of synthetic rows, by iteration."""
    return _pair("losses", "Training loss", record, "loss_real", "loss_synthetic")


def counts(record: Record) -> str:
    """What became of the samples that each iteration was given."""
    kept = Counter(row["iteration"] + 1 for row in record.selection if row["kept"])
    dropped = Counter(row["iteration"] + 1 for row in record.selection if row["fate"] in FILTERS)

    def draw(figure: Figure) -> None:
        axes = iterations(figure, record, "Synthetic samples")
        numbers = [row["iteration"] + 1 for row in record.metrics]
        below = [kept[number] for number in numbers]
        axes.bar(numbers, below, 0.7, color=COLOURS["test"], label="trained on")
        above = [dropped[number] for number in numbers]
        axes.bar(numbers, above, 0.7, bottom=below, color=COLOURS["bad"], label="dropped by the filter")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(bottom=0)
        axes.grid(axis="x", visible=False)
        legend(axes)

    return svg("counts", "Synthetic samples trained on and dropped, by iteration", SMALL, draw)


def _pair(name: str, title: str, record: Record, real: str, synthetic: str) -> str:
    def draw(figure: Figure) -> None:
        axes = iterations(figure, record, title)
        line(axes, record.metrics, real, "real", COLOURS["real"])
        line(axes, record.metrics, synthetic, "synthetic", COLOURS["synthetic"])
        axes.set_ylim(bottom=0)
        legend(axes)

    return svg(name, f"{title} of real and synthetic samples by iteration", SMALL, draw)


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
    return svg("classes", "Synthetic samples and accuracy of each class, weakest first", (11, height), draw)


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

    return svg("timeline", "When the trainer and the generator worked, and when the trainer waited", (11, 2.5), draw)


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


def _staged(record: Record) -> bool:
    """Whether stage 2 has begun: there is a before and an after."""
    return len(record.metrics) > record.config.warmup_iterations
