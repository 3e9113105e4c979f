"""RL-identity's Figure 4: real, erased and synthetic samples of some identities on a globe, and how far they spread.

The paper takes features of a pretrained ResNet-50; these are the run's own model's. Each is None where the run did not
keep such samples.
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from trainer.metrics.feature_file import KINDS, FeatureMap
from trainer.report import dosnes
from trainer.report.svg import COLOURS, svg

MARKS = {"real": ("o", "real"), "erased": ("s", "random erasing"), "kept": ("^", "synthetic")}  # marker, name
HUES = ("real", "synthetic", "test", "bad", "score", "wait", "vog", "evaluate", "adapt", "caption")  # of ten classes
FEWEST = 12  # samples that can be placed


def shown(found: FeatureMap | None) -> FeatureMap | None:
    """The samples of the classes of which some were erased, dropped ones left out."""
    if found is None:
        return None
    labels = np.unique(found.labels[found.kinds == KINDS.index("erased")])
    rows = np.isin(found.labels, labels) & np.isin(found.kinds, [KINDS.index(kind) for kind in MARKS])
    if rows.sum() < FEWEST:
        return None
    return FeatureMap(found.components[rows], found.labels[rows], found.kinds[rows])


def globe(found: FeatureMap | None) -> str | None:
    """The samples by DOSNES, as a map of equal areas: a colour for each class, a mark for each kind."""
    chosen = shown(found)
    if chosen is None:
        return None
    perplexity = min(30.0, (len(chosen.labels) - 1) / 4)
    places = dosnes.hammer(dosnes.embed(chosen.components.astype(np.float64), perplexity))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.set_title("Feature space on a sphere")
        turn = np.linspace(0, 2 * np.pi, 200)
        axes.plot(8**0.5 * np.cos(turn), 2**0.5 * np.sin(turn), color=COLOURS["grid"], linewidth=0.8)
        for kind, (marker, name) in MARKS.items():
            own = chosen.kinds == KINDS.index(kind)
            for place, label in enumerate(np.unique(chosen.labels)):
                points = places[own & (chosen.labels == label)]
                axes.scatter(*points.T, s=16, marker=marker, color=COLOURS[HUES[place % len(HUES)]], linewidths=0.5)
            if own.any():
                axes.scatter([], [], s=16, marker=marker, color=COLOURS["muted"], label=name)
        axes.set(xticks=[], yticks=[], aspect="equal")
        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=3, handlelength=1)

    return svg("globe", "Real, erased and synthetic samples of some classes on a sphere", (4.6, 3.2), draw)


def reading(found: FeatureMap | None) -> str:
    """How far erased and synthetic samples lie from the centre of their class's real ones, and whose centre is the
    nearest, in all components."""
    chosen = shown(found)
    if chosen is None:
        return ""
    classes = np.unique(chosen.labels[chosen.kinds == 0])
    centres = np.stack([chosen.components[(chosen.kinds == 0) & (chosen.labels == label)].mean(0) for label in classes])
    apart = np.linalg.norm(chosen.components[:, None] - centres, axis=2)  # [N, classes]
    own = chosen.labels[:, None] == classes
    parts = []
    for kind, (_, name) in MARKS.items():
        rows = (chosen.kinds == KINDS.index(kind)) & own.any(1)
        if rows.any():
            far, right = np.median(apart[rows][own[rows]]), own[rows, apart[rows].argmin(1)].mean()
            parts.append(f"{name} {far:.2g} away, {100 * right:.0f} % nearest to their own")
    return (
        f"A colour is a class, {len(classes)} at random, placed by DOSNES of the run's own model's features. Median "
        f"distance to the centre of a class's real samples, and part that is nearest to its own class's: "
        f"{'; '.join(parts)}. Wide and still nearest to their own is what synthetic samples should be."
    )
