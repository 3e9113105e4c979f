"""The report as a page: what is said, in what order, and what is said where something is missing.

Every text from the run is escaped. The page refers to nothing outside itself.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape

from trainer.record import Record
from trainer.report import clip_quality, figures, gallery, identity, measured, recall, tables, versions
from trainer.report.pictures import Album
from trainer.report.style import CSS
from trainer.report.words import FILTERS, seconds
from trainer.settings import TrainerConfig
from trainer.summary import Summary, headline_of, summary_of


def page(record: Record, baselines: Sequence[Record] = ()) -> str:
    """The whole report of a run, as one HTML document."""
    album = Album(record)
    names = _class_names(record, album)
    scarce = any(feedback.classes for feedback in record.feedback)
    own, others = summary_of(record), [summary_of(baseline) for baseline in baselines]
    quality = clip_quality.section(record, baselines)
    who, what = identity.section(record, baselines), recall.section(record, baselines, names)
    sections = [
        _header(record, own, others),
        _section("Comparison" if others else "The run in numbers", tables.comparison(own, others)),
        *([_section("Who is recognised", who)] if who else []),
        *([_section("What is recognised", what)] if what else []),
        _section("Where the samples went", tables.books(own)),
        _section("Which weights made them", versions.section(record)),
        _section("Curves", _curves(record, baselines)),
        _section("Does it overfit, and what teaches it?", measured.fit(record, baselines, own, others)),
        *([] if who or what else [_section("Robustness", measured.robustness(record, baselines, own, others))]),
        _section("Which classes were given samples", measured.classes(record, names)),
        _section("Where the samples lie", measured.features(record, names)),
        _section("What it cost", measured.hours(own, others)),
        _section("Who worked when", _timeline(record, own)),
        _section("Hard samples and what was made for them", gallery.hard_samples(album, own.prompts_by)),
        *([_section("Scarce classes and what was made for them", gallery.scarce_classes(album))] if scarce else []),
        *([_section("How good the synthetic clips are", quality)] if quality else []),
        _section(f"What {FILTERS[album.filter]} chose", gallery.chosen(album)),
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
        about = "members of that pool" if config.mode == "synthetic" else "real samples"
        how = "A pool of synthetic samples stood in for the real ones. " if config.mode == "synthetic" else ""
        how += (
            f"In each iteration the {about} that the model was least sure of were sent to a generator, which made new "
            "ones like them. "
        )
        how += (
            "Every iteration waited for the samples it asked for."
            if k == 0
            else f"The model went on training meanwhile: samples asked for up to {k} iteration{'s' if k > 1 else ''} "
            "earlier were used, older ones dropped."
        )
    filters = []
    if config.filter:
        filters.append(f"{FILTERS[config.filter]} dropped {_dropped(config)} of each class once an iteration")
    if config.lookahead.enabled:
        filters.append(f"lookahead kept {config.lookahead.keep:.0%} of the synthetic rows of each batch")
    return f"{how} Of what came, {' and '.join(filters)}." if filters else how


def _dropped(config: TrainerConfig) -> str:
    return "a part that it learnt" if config.thresholds.auto else f"{config.dropped:.0%}"


# ---------------------------------------------------------------- charts


def _class_names(record: Record, album: Album) -> list[str]:
    """By label, as far as the classes were evaluated."""
    named = dict(enumerate(album.classes)) | record.class_names()
    evaluated = record.metrics[-1] if record.metrics else {}
    labels = max([len(evaluated.get(field) or []) for field in ("per_class", "train_per_class")] + [len(album.classes)])
    return [named.get(label, f"class {label}") for label in range(labels)]


def _curves(record: Record, baselines: Sequence[Record]) -> str:
    if not record.metrics:
        return "<p>No iteration is finished yet, so there is nothing to draw.</p>"
    notes = []
    if headline_of(record.metrics[-1]) is None:
        notes.append("No test split was evaluated, so there is no held-out accuracy.")
    if len(record.metrics) == 1:
        notes.append("Only one iteration is finished: each curve is a single point.")
    if not any(row["kept"] for row in record.selection):
        notes.append("No synthetic samples were trained on.")
    charts = [figures.accuracy(record, baselines), figures.losses(record)]
    if record.selection:
        charts.insert(1, figures.counts(record))
    cards = "".join(measured.figure(chart, "") for chart in charts)
    return f'<p class="note">{" ".join(notes)}</p><div class="charts">{cards}</div>'


def _timeline(record: Record, own: Summary) -> str:
    if not record.trace:
        return "<p>No interval is recorded yet.</p>"
    said = "No generator worked for this run."
    if own.generated:
        together, wall = seconds(own.overlap_s), seconds(own.wall_s)
        said = (
            f"For {together} of {wall} the generator worked while the model trained. Batches that answer alternate "
            "iterations are drawn in alternate shades."
        )
    return f"<p>{said}</p>{measured.figure(figures.timeline(record), '', wide=True)}"


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
