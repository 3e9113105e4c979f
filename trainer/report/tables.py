"""The report's numbers: the headline tiles, the comparison with other runs, the paper's tables, where samples went."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from trainer.metrics.device_hours import STAGES
from trainer.report.words import ABSENT, CORRUPTIONS, FILTERS, begun, count, percent, ratio, score, seconds, time_unit
from trainer.summary import Summary

TOO_NEAR = "dropped as too near to a real sample"
Row = tuple[str, Callable[[Summary], str]]  # what it is called, and what stands there for a run


def tiles(own: Summary, others: Sequence[Summary]) -> str:
    """The headline: four numbers, the first against the first of the others."""
    gain, first = "", others[0] if others else None
    if first and own.score is not None and first.score is not None and own.headline == first.headline:
        points = 100 * (own.score - first.score)
        direction = "up" if points > 0 else "down" if points < 0 else ""
        gain = f'<span class="{direction}">{points:+.1f} points against {escape(first.run)}</span>'
    shown = [
        (percent(own.score), f"{score(own.headline)}, held out", gain),
        (percent(own.rank1), "Rank-1", "") if own.rank1 is not None else _fairness(own),
        (percent(own.trainer_idle), "of the time the trainer waited", ""),
        (count(own.trained), "synthetic samples trained on", ""),
    ]
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{value}</b><span>{label}</span> {more}</div>' for value, label, more in shown)
        + "</div>"
    )


def _fairness(own: Summary) -> tuple[str, str, str]:
    return ratio(own.worst_case_disparity), "worst class over best class", ""


def _scores(own: Summary) -> list[Row]:
    """How good the model is, by the main figure of this run's task."""
    name = own.headline

    def value(run: Summary, number: float | None) -> str:
        return percent(number if run.headline == name else None)

    rows: list[Row] = [
        (f"{begun(score(name))}, held out", lambda s: value(s, s.score)),
        ("Best of any iteration", lambda s: value(s, s.best_score)),
    ]
    if name == "mAP":
        rows.append(("Rank-1", lambda s: percent(s.rank1)))
    if name in (None, "test_top1"):
        rows += [
            ("Worst class over best class", lambda s: ratio(s.worst_case_disparity)),
            ("Training minus held-out accuracy", lambda s: percent(s.train_val_gap)),
        ]
    return rows


ROWS: tuple[Row, ...] = (
    ("Optimiser updates", lambda s: count(s.updates)),
    ("Wall time", lambda s: seconds(s.wall_s)),
    ("Trainer idle (waiting for samples)", lambda s: percent(s.trainer_idle)),
    ("Generator idle, once asked", lambda s: percent(s.generator_idle)),
    ("Generating and training at once", lambda s: seconds(s.overlap_s)),
    ("Synthetic samples generated", lambda s: count(s.generated)),
    ("Dropped as too near to a real sample", lambda s: count(s.privacy_dropped)),
    ("Dropped by variance of gradients", lambda s: count(s.vog_dropped)),
    ("Dropped by similarity", lambda s: count(s.similarity_dropped)),
    ("Dropped as stale", lambda s: count(s.stale)),
    ("Synthetic rows seen by lookahead", lambda s: count(s.lookahead_seen)),
    ("Kept by lookahead", lambda s: count(s.lookahead_kept)),
)


def comparison(own: Summary, others: Sequence[Summary]) -> str:
    """One column a run, this one last."""
    warning = ""
    if any(summary.updates != own.updates for summary in others):
        warning = '<p class="warning">These runs did not make the same number of updates; compare them with care.</p>'
    note = "A row is one sample in one batch, so a sample counts once an epoch."
    if others:
        note = f"One run each: small differences may be chance. {note}"
    return f'{warning}{_table([*_scores(own), *ROWS], own, others)}<p class="note">{note}</p>'


def robustness(own: Summary, others: Sequence[Summary]) -> str:
    """Clean, blurred and noisy images (GenDataAgent Table 13)."""
    rows: list[Row] = [("Clean", lambda s: percent(s.test_top1))]
    for kind, name in CORRUPTIONS.items():
        rows.append((name.capitalize(), lambda s, kind=kind: percent((s.robustness or {}).get(kind))))
    return _table(rows, own, others, "Table 13.")


def gap(own: Summary, others: Sequence[Summary]) -> str:
    """Training and held-out accuracy, and their difference (Table 14); training on synthetic samples (Figure 6c)."""
    rows: list[Row] = [
        ("Training set", lambda s: percent(s.train_top1)),
        ("Held out", lambda s: percent(s.test_top1)),
        ("Gap", lambda s: percent(s.train_val_gap)),
        ("Synthetic samples", lambda s: percent(s.synthetic_top1)),
    ]
    return _table(rows, own, others, "Table 14 and Figure 6c, in numbers.")


def hours(own: Summary, others: Sequence[Summary]) -> str:
    """Device time by stage (Figure 4)."""
    runs = [*others, own]
    unit, scale = time_unit(max(sum(summary.device_hours.values()) for summary in runs))
    rows: list[Row] = [
        (name.capitalize(), lambda s, stage=stage: _time(s.device_hours.get(stage), scale))
        for stage, name in STAGES.items()
        if any(stage in summary.device_hours for summary in runs)
    ]
    rows.append((f"In all, {unit}", lambda s: _time(sum(s.device_hours.values()), scale)))
    return _table(rows, own, others, "Figure 4, in numbers.")


def _time(hours: float | None, scale: float) -> str:
    return ABSENT if hours is None else f"{scale * hours:.2f}"


def _table(rows: Sequence[Row], own: Summary, others: Sequence[Summary], caption: str = "") -> str:
    """One line a row, one column a run."""
    told = f"<caption>{escape(caption)}</caption>" if caption else ""
    head = "".join(f'<th scope="col">{escape(summary.run)}</th>' for summary in [*others, own])
    body = "".join(
        f'<tr><th scope="row">{label}</th>'
        + "".join(f"<td>{value(other)}</td>" for other in others)
        + f'<td class="own">{value(own)}</td></tr>'
        for label, value in rows
    )
    table = f"<table>{told}<thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="card">{table}</div>'


def books(own: Summary) -> str:
    """Where every sample that arrived went, and whether the run's files agree on it."""
    if not own.generated:
        return "<p>No synthetic samples arrived in this run.</p>"
    parts = [
        ("trained on", own.trained, "--good"),
        (f"dropped by {FILTERS['vog']}", own.vog_dropped, "--bad"),
        (f"dropped by {FILTERS['similarity']}", own.similarity_dropped, "--bad"),
        ("dropped as near copies", own.near_copies, "--vog"),
        (TOO_NEAR, own.privacy_dropped, "--privacy"),
        ("stale", own.stale, "--wait"),
        ("arrived too late for any iteration", own.unused or 0, "--muted"),
    ]
    if own.mode == "offline":
        verdict = "Samples of an offline pool are drawn again and again, so these numbers do not add up to it."
    elif own.balanced:
        verdict = "Every sample is accounted for: the counts of the run's files agree with each other."
    else:
        verdict = "<strong>The run's files disagree about these counts</strong>: some were lost or changed."
    asked = f" of {count(own.requested)} asked for"
    units, dead = count(own.failed_units), count(own.dead)
    failed = f" {units} work units failed, and {dead} samples with them." if own.failed_units else ""
    if own.for_classes:
        told = ", ".join(f"{escape(name)} {count(number)}" for name, number in own.for_classes.items())
        failed += f" {count(sum(own.for_classes.values()))} were asked for as samples of scarce classes: {told}."
    failed += f" {count(own.outstanding)} did not come." if own.outstanding else ""
    shown = [part for part in parts if part[1] > 0]
    bar = "".join(f'<i style="flex:{number};background:var({colour})"></i>' for _, number, colour in shown)
    legend = "".join(
        f'<li><i style="background:var({colour})"></i>{count(number)} {label}</li>'
        for label, number, colour in parts
        if number or label not in (f"dropped by {FILTERS['similarity']}", TOO_NEAR)
    )
    return (
        f"<p>{count(own.generated)} samples{asked} arrived.{failed} {verdict}</p>"
        f'<div class="card"><div class="flow" aria-hidden="true">{bar}</div><ul class="legend">{legend}</ul></div>'
    )
