"""Which weight sets made a run's samples, and what became of those of each: the generator may be tuned while the model
trains, and its weights exchanged.

Knows a run's record. Each sample is counted by its own record of the weights that made it, whatever its batch says.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from protocol.messages import WeightsRef
from trainer.record import Record
from trainer.report.svg import COLOURS, SMALL, iterations, legend, svg
from trainer.report.words import ABSENT, count

NAMED = 6  # weight sets whose names fit into a legend
SHOWN = 3  # batches named where some are mixed


@dataclass(frozen=True)
class Version:
    """What one weight set made."""

    weights: WeightsRef
    arrived: int  # samples
    trained: Counter[int]  # iteration -> samples trained on; offline a sample may come again
    dropped: Counter[int]  # iteration -> samples that were handed to it and dropped, stale ones included


def versions(record: Record) -> list[Version]:
    """One for each weight set that made a sample which arrived, in the order of their first."""
    made = {sample.id: sample.weights for sample in record.samples()}
    arrived = Counter(made.values())
    trained: dict[WeightsRef, Counter[int]] = defaultdict(Counter)
    dropped: dict[WeightsRef, Counter[int]] = defaultdict(Counter)
    for row in record.selection:
        if row["id"] in made:
            (trained if row["kept"] else dropped)[made[row["id"]]][row["iteration"]] += 1
    return [Version(weights, number, trained[weights], dropped[weights]) for weights, number in arrived.items()]


def mixed(record: Record) -> list[str]:
    """Units whose batch has samples of other weights than it says it was made with."""
    return [batch.unit_id for batch in record.batches if {sample.weights for sample in batch.samples} - {batch.weights}]


def section(record: Record) -> str:
    """What is said of it, as HTML."""
    found, wrong = versions(record), mixed(record)
    if not found:
        return "<p>No synthetic samples arrived in this run.</p>"
    told = (
        f"{len(found)} weight sets made" if len(found) > 1 else f"One weight set, {escape(str(found[0].weights))}, made"
    )
    text = f"<p>{told} the samples of this run. {_verdict(record, wrong)}</p>"
    return text + f'<div class="charts">{_card(chart(record, found))}{_table(found)}</div>'


def chart(record: Record, found: Sequence[Version]) -> str:
    """Samples trained on by iteration, those of older weights lighter and below."""

    def draw(figure: Figure) -> None:
        axes = iterations(figure, record, "Samples trained on, by weights")
        numbers = [row["iteration"] for row in record.metrics]
        below = [0] * len(numbers)
        for place, version in enumerate(found):
            bars = [version.trained[number] for number in numbers]
            label = str(version.weights) if len(found) <= NAMED or place in (0, len(found) - 1) else None
            look = {"color": COLOURS["synthetic"], "alpha": 0.3 + 0.7 * (place + 1) / len(found), "label": label}
            axes.bar([number + 1 for number in numbers], bars, 0.7, bottom=below, **look)
            below = [low + bar for low, bar in zip(below, bars, strict=True)]
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(bottom=0)
        axes.grid(axis="x", visible=False)
        legend(axes)

    return svg("versions", "Synthetic samples trained on by iteration and weight set", SMALL, draw)


def _verdict(record: Record, wrong: Sequence[str]) -> str:
    if not wrong:
        number = sum(bool(batch.samples) for batch in record.batches)
        return f"No batch mixes them: each of the {count(number)} was made by one set throughout."
    named = ", ".join(escape(name) for name in wrong[:SHOWN]) + (" and others" if len(wrong) > SHOWN else "")
    return f"<strong>{count(len(wrong))} batches mix samples of several weight sets</strong>: {named}."


def _table(found: Sequence[Version]) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in ("arrived", "trained on", "dropped", "in iterations"))
    body = "".join(
        f'<tr><th scope="row" title="{escape(version.weights.digest)}">{escape(str(version.weights))}</th>'
        f"<td>{count(version.arrived)}</td><td>{count(version.trained.total())}</td>"
        f"<td>{count(version.dropped.total())}</td><td>{_span(version.trained)}</td></tr>"
        for version in found
    )
    table = f'<table><thead class="words"><tr><th>weights</th>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="card">{table}</div>'


def _span(trained: Counter[int]) -> str:
    """The first and the last iteration that trained on any."""
    if not trained:
        return ABSENT
    first, last = min(trained) + 1, max(trained) + 1
    return str(first) if first == last else f"{first}\N{EN DASH}{last}"


def _card(drawn: str) -> str:
    return f'<figure class="card"><div class="drawn">{drawn}</div></figure>'
