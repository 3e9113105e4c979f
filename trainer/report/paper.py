"""GenDataAgent's figures and tables as charts of one run, beside those of its baselines.

Knows what a run's folder holds, and nothing of HTML beyond one <svg> element. Each chart is None where the run did not
measure what it shows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from trainer.metrics.class_counts import Relation
from trainer.metrics.device_hours import STAGES
from trainer.metrics.feature_file import KINDS, FeatureMap
from trainer.record import Record
from trainer.report.svg import COLOURS, SMALL, iterations, legend, line, svg
from trainer.report.words import CORRUPTIONS, DEVICES, score, time_unit
from trainer.summary import Summary

HEADLINES = {"test_top1": "Top-1", "mAP": "mAP", "verification": "Verified"}  # main figure -> title of a narrow chart
NAMED = 15  # classes whose names fit into a chart
FEWEST = 10  # samples that t-SNE can place
MARKS = {"real": ("real", "o", 14), "kept": ("synthetic", "^", 18), "dropped": ("bad", "x", 18)}  # colour, marker, size


def gap(record: Record, baselines: Sequence[Record]) -> str | None:
    """Training minus held-out accuracy by iteration (Figure 6a, Table 14)."""
    if not any("train_val_gap" in row for row in record.metrics):
        return None

    def draw(figure: Figure) -> None:
        axes = iterations(figure, record, "Training minus held-out accuracy")
        line(axes, record.metrics, "train_val_gap", record.config.run, COLOURS["test"])
        for baseline in baselines:
            line(axes, baseline.metrics, "train_val_gap", baseline.config.run, COLOURS["muted"], linestyle="--")
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        legend(axes)

    return svg("gap", "Gap between training and held-out accuracy by iteration", SMALL, draw)


def fit(record: Record) -> str | None:
    """Accuracy on real training samples, on synthetic ones and on held-out ones by iteration (Figure 6c)."""
    if not any(row.get("synthetic_top1") is not None for row in record.metrics):
        return None

    def draw(figure: Figure) -> None:
        axes = iterations(figure, record, "Accuracy on what is trained on")
        line(axes, record.metrics, "train_top1", "real, training", COLOURS["real"], linestyle=":")
        line(axes, record.metrics, "synthetic_top1", "synthetic, training", COLOURS["synthetic"])
        line(axes, record.metrics, "test_top1", "real, held out", COLOURS["test"], linestyle="--")
        legend(axes)

    return svg("fit", "Accuracy on real and synthetic training samples by iteration", SMALL, draw)


def gradients(record: Record) -> str | None:
    """Mean gradient norm of real and of synthetic samples by iteration (Figure 6b)."""
    if not any(row.get("gradient_real") is not None for row in record.metrics):
        return None

    def draw(figure: Figure) -> None:
        axes = iterations(figure, record, "Gradient magnitude")
        line(axes, record.metrics, "gradient_real", "real", COLOURS["real"])
        line(axes, record.metrics, "gradient_synthetic", "synthetic", COLOURS["synthetic"], linestyle="--")
        axes.set_ylim(bottom=0)
        legend(axes)

    return svg("gradients", "Gradient magnitude of real and synthetic samples by iteration", SMALL, draw)


def robustness(record: Record, baselines: Sequence[Record]) -> str | None:
    """Held-out accuracy by the severity of each corruption, 0 being the clean images (Table 13)."""
    if not record.metrics or "corrupted" not in record.metrics[-1]:
        return None
    styles = {"gaussian_blur": ("real", "-", "o"), "speckle_noise": ("synthetic", "--", "s")}

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.set_title("Accuracy on corrupted images")
        axes.set_xlabel("severity")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for run in [*baselines, record]:
            last = run.metrics[-1] if run.metrics else {}
            for kind, by_severity in last.get("corrupted", {}).items():
                colour, dashes, marker = styles[kind]
                points = [(0, last["test_top1"]), *((int(s), value) for s, value in by_severity.items())]
                own = run is record
                name = CORRUPTIONS[kind] + ("" if own else f", {run.config.run}")
                look = {"color": COLOURS[colour if own else "muted"], "linestyle": dashes, "marker": marker}
                axes.plot(*zip(*sorted(points), strict=True), label=name, **look)
        legend(axes)

    return svg("robustness", "Held-out accuracy on blurred and on noisy images by severity", SMALL, draw)


def class_counts(name: str, title: str, relation: Relation | None, names: Sequence[str]) -> str | None:
    """Each class's synthetic samples against its accuracy or gain, with the line of least squares (Figure 5).

    Args:
        names: label -> class name.
    """
    if relation is None:
        return None
    x, y = np.array(relation.samples, float), np.array(relation.values)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.set_title(title)
        axes.set_xlabel("synthetic samples of the class")
        axes.set_ylabel(f"{relation.split} accuracy" if y.min() >= 0 and name == "first" else f"gain, {relation.split}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        if relation.correlation is not None:
            slope, start = np.polyfit(x, y, 1)
            ends = np.array([x.min(), x.max()])
            axes.plot(ends, start + slope * ends, color=COLOURS["muted"], linestyle="--", label="least squares")
        axes.plot(x, y, "o", color=COLOURS["synthetic"], markersize=5)
        if len(x) <= NAMED:
            for label, at in zip(relation.labels, zip(x, y, strict=True), strict=True):
                axes.annotate(names[label], at, xytext=(4, 3), textcoords="offset points", fontsize=8)
        axes.margins(0.12)

    return svg(f"counts-{name}", f"{title}: synthetic samples of each class", SMALL, draw)


def feature_map(found: FeatureMap | None, names: Sequence[str]) -> str | None:
    """Real, kept and dropped synthetic samples in the model's feature space, by t-SNE (Figure 3)."""
    rows = None if found is None else found.kinds != KINDS.index("erased")
    if found is None or rows.sum() < FEWEST:
        return None
    labels, kinds = found.labels[rows], found.kinds[rows]
    places = _tsne(found.components[rows])
    real = kinds == KINDS.index("real")
    shown = np.unique(labels)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.set_title("Feature space")
        for kind, (colour, marker, size) in MARKS.items():
            points = places[kinds == KINDS.index(kind)]
            label = kind if kind == "real" else f"synthetic, {kind}"
            axes.scatter(*points.T, s=size, marker=marker, color=COLOURS[colour], label=label, linewidths=1, alpha=0.8)
        if len(shown) <= NAMED:
            for label in shown:
                _name(axes, places[real & (labels == label)], names[label])
        axes.set(xticks=[], yticks=[])
        axes.grid(visible=False)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=3, handlelength=1)

    return svg("features", "Real, kept and dropped synthetic samples in the model's feature space", (4.6, 4.2), draw)


def _name(axes: Axes, points: np.ndarray, name: str) -> None:
    if len(points):
        style = {"fontweight": "bold", "fontsize": 11, "ha": "center", "xytext": (0, 10), "textcoords": "offset points"}
        axes.annotate(name, (np.median(points[:, 0]), points[:, 1].max()), **style)


def _tsne(components: np.ndarray) -> np.ndarray:
    """[N, 2] of [N, K]; the same samples give the same picture."""
    from sklearn.manifold import TSNE  # takes seconds to import, and few reports need it

    perplexity = min(30.0, (len(components) - 1) / 3)
    start = components[:, :2] / max(components[:, 0].std(), 1e-12) * 1e-4
    return TSNE(init=start.astype(np.float32), perplexity=perplexity, random_state=0).fit_transform(components)


def hours(summaries: Sequence[Summary]) -> str | None:
    """Device time by stage of each run, the last its own, beside how good it is (Figure 4)."""
    if not any(summary.device_hours for summary in summaries):
        return None
    unit, scale = time_unit(max(sum(summary.device_hours.values()) for summary in summaries))
    rows, own = range(len(summaries)), summaries[-1]

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 1])
        done = np.zeros(len(summaries))
        for stage in STAGES:
            took = np.array([scale * summary.device_hours.get(stage, 0.0) for summary in summaries])
            if took.any():
                edge = {"edgecolor": COLOURS["card"], "linewidth": 0.8}
                left.barh(rows, took, 0.55, left=done, color=COLOURS[stage], label=STAGES[stage], **edge)
                done += took
        left.set_yticks(rows, [summary.run for summary in summaries])
        left.set_title(f"{DEVICES.get(summaries[-1].device or '', 'Device')} {unit}")
        right.set_title(HEADLINES.get(own.headline or "test_top1", ""))
        known = [(s.score, row) for row, s in zip(rows, summaries, strict=True) if _comparable(s, own)]
        right.plot(*zip(*known, strict=True), "o", color=COLOURS["test"], markersize=6) if known else None
        for value, row in known:
            right.annotate(f"{100 * value:.1f} %", (value, row), xytext=(0, 7), textcoords="offset points", ha="center")
        right.margins(x=0.6, y=0.5)
        right.set_xticks([])
        for axes in (left, right):
            axes.grid(axis="y", visible=False)
            axes.tick_params(axis="y", length=0)
            axes.set_ylim(len(summaries) - 0.5, -0.6)
        figure.legend(loc="outside lower center", ncols=2, handlelength=1, columnspacing=1.2)

    return svg("hours", f"Device time by stage, and {score(own.headline)}", (4.6, 2.0 + 0.55 * len(summaries)), draw)


def _comparable(summary: Summary, own: Summary) -> bool:
    return summary.score is not None and summary.headline == own.headline
