"""The report's sections on what the paper measures: each chart with its number there and one line that reads it.

What a run did not measure is said in the chart's place. Every text from the run is escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from trainer.metrics import class_counts, feature_file
from trainer.record import Record
from trainer.report import distribution, figures, paper, readings, tables, words
from trainer.summary import Summary

Runs = Sequence[Record]
Summaries = Sequence[Summary]


def figure(chart: str | None, reading: str, number: str = "", wide: bool = False) -> str:
    """A chart on a card with what it says below it.

    Args:
        number: of the paper's figure or table, "Figure 3".
    """
    told = f"<b>{escape(number)}.</b> " if number else ""
    if chart is None:
        return f'<p class="card note">{told}Not measured in this run.</p>'
    swipe = '<span class="swipe">Wider than this screen: move it sideways.</span>' if wide else ""
    caption = f"<figcaption>{told}{escape(reading)}{swipe}</figcaption>" if told or reading or swipe else ""
    chart = f'<div class="drawn">{chart}</div>'
    return f'<figure class="card{" wide" if wide else ""}">{chart}{caption}</figure>'


def robustness(record: Record, baselines: Runs, own: Summary, others: Summaries) -> str:
    """Table 13."""
    chart = paper.robustness(record, baselines)
    if chart is None:
        return figure(None, "", "Table 13")
    scale = words.SCALES[record.metrics[-1]["corruption_scale"]]
    how = f"Each held-out image is blurred or made noisy at the severities of {scale}; the table has their mean."
    return f"<p>{how}</p>{_beside(figure(chart, readings.robustness(own), 'Table 13'), tables.robustness(own, others))}"


def fit(record: Record, baselines: Runs, own: Summary, others: Summaries) -> str:
    """Table 14 and Figure 6."""
    charts = [
        figure(paper.gap(record, baselines), readings.gap(own), "Figure 6a, Table 14"),
        figure(paper.fit(record), readings.fit(own), "Figure 6c"),
        figure(paper.gradients(record), readings.gradients(record), "Figure 6b"),
    ]
    return _beside(*charts, tables.gap(own, others))


def classes(record: Record, names: Sequence[str]) -> str:
    """Figure 5, and each class on its own.

    Args:
        names: label -> class name.
    """
    first, gained = class_counts.first(record), class_counts.gained(record)
    told = "" if first is None else readings.first_counts(first)
    begun = figure(paper.class_counts("first", "First samples", first, names), told, "Figure 5, left")
    told = "" if gained is None else readings.gained_counts(gained)
    whole = figure(paper.class_counts("gained", "All samples", gained, names), told, "Figure 5, right")
    if not record.metrics or not record.metrics[-1].get("per_class"):
        return _beside(begun, whole)
    hidden = len(names) - figures.MOST_CLASSES
    more = f"The {figures.MOST_CLASSES} weakest of {len(names)} classes." if hidden > 0 else ""
    return _beside(begun, whole) + figure(figures.classes(record, names), more, wide=True)


def features(record: Record, names: Sequence[str]) -> str:
    """GenDataAgent's Figure 3 and RL-identity's Figure 4. Arguments as in `classes`."""
    found = feature_file.read(record.folder)
    told = "" if found is None else readings.feature_map(found)
    plane = figure(paper.feature_map(found, names), told, "Figure 3")
    sphere = figure(distribution.globe(found), distribution.reading(found), "RL-identity, Figure 4")
    return _beside(plane, sphere)


def hours(own: Summary, others: Summaries) -> str:
    """Figure 4."""
    chart = paper.hours([*others, own])
    if chart is None or not own.device_hours:
        return figure(None, "", "Figure 4")
    return _beside(figure(chart, readings.hours(own), "Figure 4"), tables.hours(own, others))


def _beside(*parts: str) -> str:
    return f'<div class="charts">{"".join(parts)}</div>'
