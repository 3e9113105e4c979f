"""The report's numbers: the headline tiles, the comparison with other runs, and where every sample went."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from trainer.summary import Summary

ABSENT = "\N{EN DASH}"


def tiles(own: Summary, others: Sequence[Summary]) -> str:
    """The headline: four numbers, the first against the first of the others."""
    gain = ""
    if others and own.test_top1 is not None and others[0].test_top1 is not None:
        points = 100 * (own.test_top1 - others[0].test_top1)
        direction = "up" if points > 0 else "down" if points < 0 else ""
        gain = f'<span class="{direction}">{points:+.1f} points against {escape(others[0].run)}</span>'
    shown = [
        (_percent(own.test_top1), "top-1 accuracy, held out", gain),
        (_ratio(own.worst_case_disparity), "worst class over best class", ""),
        (_percent(own.trainer_idle), "of the time the trainer waited", ""),
        (_count(own.trained), "synthetic samples trained on", ""),
    ]
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{value}</b><span>{label}</span> {more}</div>' for value, label, more in shown)
        + "</div>"
    )


def _percent(value: float | None) -> str:
    return ABSENT if value is None else f"{100 * value:.1f} %"


def _ratio(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.3f}"


def seconds(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.1f} s"


def _count(value: int | None) -> str:
    return ABSENT if value is None else f"{value:,}"


ROWS: tuple[tuple[str, Callable[[Summary], str]], ...] = (
    ("Top-1 accuracy, held out", lambda s: _percent(s.test_top1)),
    ("Best of any iteration", lambda s: _percent(s.best_test_top1)),
    ("Worst class over best class", lambda s: _ratio(s.worst_case_disparity)),
    ("Training minus held-out accuracy", lambda s: _percent(s.train_val_gap)),
    ("Optimiser updates", lambda s: _count(s.updates)),
    ("Wall time", lambda s: seconds(s.wall_s)),
    ("Trainer idle (waiting for samples)", lambda s: _percent(s.trainer_idle)),
    ("Generator idle, once asked", lambda s: _percent(s.generator_idle)),
    ("Generating and training at once", lambda s: seconds(s.overlap_s)),
    ("Synthetic samples generated", lambda s: _count(s.generated)),
    ("Dropped by variance of gradients", lambda s: _count(s.vog_dropped)),
    ("Dropped as stale", lambda s: _count(s.stale)),
    ("Synthetic rows seen by lookahead", lambda s: _count(s.lookahead_seen)),
    ("Kept by lookahead", lambda s: _count(s.lookahead_kept)),
)


def comparison(own: Summary, others: Sequence[Summary]) -> str:
    """One column a run, this one last."""
    head = "".join(f'<th scope="col">{escape(summary.run)}</th>' for summary in [*others, own])
    body = "".join(
        f'<tr><th scope="row">{label}</th>'
        + "".join(f"<td>{value(other)}</td>" for other in others)
        + f'<td class="own">{value(own)}</td></tr>'
        for label, value in ROWS
    )
    warning = ""
    if any(summary.updates != own.updates for summary in others):
        warning = '<p class="warning">These runs did not make the same number of updates; compare them with care.</p>'
    note = "A row is one sample in one batch, so a sample counts once an epoch."
    if others:
        note = f"One run each: small differences may be chance. {note}"
    return (
        f'{warning}<div class="card"><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f'<p class="note">{note}</p>'
    )


def books(own: Summary) -> str:
    """Where every sample that arrived went, and whether the run's files agree on it."""
    if not own.generated:
        return "<p>No synthetic samples arrived in this run.</p>"
    parts = [
        ("trained on", own.trained, "--good"),
        ("dropped by variance of gradients", own.vog_dropped, "--bad"),
        ("dropped as near copies", own.near_copies, "--vog"),
        ("stale", own.stale, "--wait"),
        ("arrived too late for any iteration", own.unused or 0, "--muted"),
    ]
    if own.mode == "offline":
        verdict = "Samples of an offline pool are drawn again and again, so these numbers do not add up to it."
    elif own.balanced:
        verdict = "Every sample is accounted for: the counts of the run's files agree with each other."
    else:
        verdict = "<strong>The run's files disagree about these counts</strong>: some were lost or changed."
    asked = f" of {_count(own.requested)} asked for"
    units, dead = _count(own.failed_units), _count(own.dead)
    failed = f" {units} work units failed, and {dead} samples with them." if own.failed_units else ""
    failed += f" {_count(own.outstanding)} did not come." if own.outstanding else ""
    shown = [part for part in parts if part[1] > 0]
    bar = "".join(f'<i style="flex:{number};background:var({colour})"></i>' for _, number, colour in shown)
    legend = "".join(
        f'<li><i style="background:var({colour})"></i>{_count(number)} {label}</li>' for label, number, colour in parts
    )
    return (
        f"<p>{_count(own.generated)} samples{asked} arrived.{failed} {verdict}</p>"
        f'<div class="card"><div class="flow" aria-hidden="true">{bar}</div><ul class="legend">{legend}</ul></div>'
    )
