"""The report as a page: what is said, in what order, and what is said where something is missing.

Every text from the run is escaped. The page refers to nothing outside itself.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape

from trainer.record import Record
from trainer.report import figures, gallery, tables
from trainer.report.pictures import Album
from trainer.report.style import CSS
from trainer.summary import Summary, summary_of


def page(record: Record, baselines: Sequence[Record] = ()) -> str:
    """The whole report of a run, as one HTML document."""
    album = Album(record)
    own, others = summary_of(record), [summary_of(baseline) for baseline in baselines]
    sections = [
        _header(record, own, others),
        _section("Comparison" if others else "The run in numbers", tables.comparison(own, others)),
        _section("Where the samples went", tables.books(own)),
        _section("Curves", _curves(record, baselines, album)),
        _section("Who worked when", _timeline(record, own)),
        _section("Hard samples and what was made for them", gallery.hard_samples(album)),
        _section("What variance of gradients chose", gallery.chosen_by_vog(album)),
        _section("Near copies", gallery.near_copies(album)),
        _section("Events", _events(record)),
        _section("Settings", _settings(record)),
    ]
    title = escape(f"{record.config.run}: training on the fly")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>'
        f"<style>{CSS}</style></head><body><main>{''.join(sections)}"
        f"<footer>Made by onthefly from {escape(os.fspath(record.folder))}.</footer></main></body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


# ---------------------------------------------------------------- head


def _header(record: Record, own: Summary, others: Sequence[Summary]) -> str:
    config = record.config
    facts = f"{config.task} · {config.mode} · {own.iterations} iterations · {own.updates} updates · seed {config.seed}"
    progress = ""
    if own.iterations < own.iterations_planned:
        progress = (
            f'<p class="warning">This run is not finished: {own.iterations} of {own.iterations_planned} iterations '
            "are done. What follows is as far as it has come.</p>"
        )
    return (
        f'<header><p class="meta">Training on the fly</p><h1>{escape(config.run)}</h1>'
        f'<p class="meta">{escape(facts)}</p>'
        f"<p>{escape(_explanation(record))}</p>{progress}{tables.tiles(own, others)}</header>"
    )


def _explanation(record: Record) -> str:
    """What this run did, in a paragraph."""
    config, k = record.config, record.config.staleness
    if config.mode == "real":
        return "This run trained on real data only; nothing was generated."
    if config.mode == "offline":
        how = "Synthetic samples were made beforehand, some for every real one, and drawn again in each iteration."
    else:
        how = (
            "In each iteration the real samples that the model was least sure of were sent to a generator, which made "
            "new ones like them. "
        )
        how += (
            "Every iteration waited for the samples it asked for."
            if k == 0
            else f"The model went on training meanwhile: samples asked for up to {k} iteration{'s' if k > 1 else ''} "
            "earlier were used, older ones dropped."
        )
    filters = []
    if config.vog.enabled:
        filters.append(f"variance of gradients dropped {config.vog.fraction:.0%} of each class once an iteration")
    if config.lookahead.enabled:
        filters.append(f"lookahead kept {config.lookahead.keep:.0%} of the synthetic rows of each batch")
    return f"{how} Of what came, {' and '.join(filters)}." if filters else how


# ---------------------------------------------------------------- charts


def _curves(record: Record, baselines: Sequence[Record], album: Album) -> str:
    if not record.metrics:
        return "<p>No iteration is finished yet, so there is nothing to draw.</p>"
    notes = []
    if "test_top1" not in record.metrics[-1]:
        notes.append("No test split was evaluated, so there is no held-out accuracy.")
    if len(record.metrics) == 1:
        notes.append("Only one iteration is finished: each curve is a single point.")
    if not any(row["kept"] for row in record.selection):
        notes.append("No synthetic samples were trained on.")
    small = [figures.accuracy(record, baselines), figures.losses(record), figures.gradients(record)]
    if record.selection:
        small.insert(1, figures.counts(record))
    wide = ""
    if record.metrics[-1].get("per_class"):
        accuracies = record.metrics[-1]["per_class"]
        named = dict(enumerate(album.classes)) | record.class_names()
        names = [named.get(label, f"class {label}") for label in range(len(accuracies))]
        chart = figures.classes(record, names)
        hidden = len(names) - figures.MOST_CLASSES
        more = f"The {figures.MOST_CLASSES} weakest of {len(names)} classes." if hidden > 0 else ""
        wide = f'<figure class="card wide">{chart}<figcaption>{more}</figcaption></figure>'
    cards = "".join(f'<figure class="card">{chart}</figure>' for chart in small)
    return f'<p class="note">{" ".join(notes)}</p><div class="charts">{cards}</div>{wide}'


def _timeline(record: Record, own: Summary) -> str:
    if not record.trace:
        return "<p>No interval is recorded yet.</p>"
    said = "No generator worked for this run."
    if own.generated:
        together, wall = tables.seconds(own.overlap_s), tables.seconds(own.wall_s)
        said = (
            f"For {together} of {wall} the generator worked while the model trained. Batches that answer alternate "
            "iterations are drawn in alternate shades."
        )
    return f'<p>{said}</p><figure class="card wide">{figures.timeline(record)}</figure>'


# ---------------------------------------------------------------- the rest


def _events(record: Record) -> str:
    if not record.events:
        return "<p>Nothing out of the ordinary: no outage, no lost or late sample.</p>"
    start = min([row["start"] for row in record.trace] + [row["time"] for row in record.events])
    body = "".join(
        f'<tr><td class="time">{row["time"] - start:.1f} s</td><td>{escape(row["event"])}</td>'
        f"<td>{escape(row['message'])}</td></tr>"
        for row in record.events
    )
    head = (
        '<tr><th class="time" scope="col">after</th><th scope="col">event</th><th scope="col">what happened</th></tr>'
    )
    return f'<div class="card"><table class="events"><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def _settings(record: Record) -> str:
    return (
        '<details class="card"><summary>All settings of this run, as they were resolved</summary>'
        f"<pre>{escape(record.settings)}</pre></details>"
    )
