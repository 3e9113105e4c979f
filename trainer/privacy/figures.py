"""The privacy report's charts: how distances are distributed, and the attack's ROC curve. Knows nothing of HTML."""

from __future__ import annotations

from matplotlib.figure import Figure

from trainer.privacy.assessment import Comparison, MembershipInference
from trainer.report.svg import COLOURS, SMALL, legend, svg


def distances(name: str, title: str, found: Comparison) -> str:
    """Cumulative distributions of the distance to the nearest training image."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for of, label, colour in ((found.held_out, "held out", "test"), (found.synthetic, "synthetic", "synthetic")):
            parts = [point / (len(of.curve) - 1) for point in range(len(of.curve))]
            axes.plot(of.curve, parts, label=label, color=COLOURS[colour])
        axes.axvline(found.limit, color=COLOURS["muted"], linestyle="--", linewidth=1, label="close")
        axes.set_title(title)
        axes.set_xlabel("distance to the nearest training image")
        axes.set_ylabel("part of the images")
        axes.set_xlim(left=0)
        axes.set_ylim(0, 1.02)
        legend(axes)

    return svg(name, f"{title}: cumulative distributions of distances to the nearest training image", SMALL, draw)


def roc(name: str, found: MembershipInference) -> str:
    """True against false positive rate of the attack, beside those of guessing."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=COLOURS["muted"], linestyle="--", linewidth=1, label="guessing")
        axes.plot(*zip(*found.roc, strict=True), color=COLOURS["bad"], label="nearest synthetic image")
        axes.set_title("Membership inference")
        axes.set_xlabel("false positive rate")
        axes.set_ylabel("true positive rate")
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        axes.set_aspect("equal")
        legend(axes)

    return svg(name, "ROC curve of the membership inference attack", SMALL, draw)
