"""Entries of an emotion drawn from the knowledge base, with an intensity for each action unit and the words for it.

    {(A*_j, d*_j)}, j = 1..k  ~  Uniform({(A_i, d_i) | c_i = e_t})        (eq. 8)
    F_AU = {d*_j + modifier(r)}, j = 1..k                                 (eq. 9)

The same seed draws the same. Knows nothing of who writes prompts of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

from agent.expressions.knowledge import Entry

Option = TypeVar("Option")


class Level(NamedTuple):
    """A range of intensities; the five are those that FACS scores with A to E."""

    most: float
    adverbs: tuple[str, ...]
    adjectives: tuple[str, ...]


LEVELS = (
    Level(0.2, ("faintly", "minimally"), ("faint",)),
    Level(0.4, ("slightly", "a little", "somewhat"), ("slight", "mild")),
    Level(0.6, ("moderately", "visibly", "noticeably"), ("moderate", "visible")),
    Level(0.8, ("markedly", "clearly", "strongly"), ("marked", "clear", "strong")),
    Level(1.0, ("sharply", "intensely"), ("intense", "sharp")),
)


@dataclass(frozen=True)
class Described:
    """One candidate, as intense as it was drawn."""

    units: Mapping[str, float]  # code -> r, in (0, 1]
    text: str  # its description with adverbs, without codes


@dataclass(frozen=True)
class Retrieved:
    """F_AU."""

    candidates: Sequence[Described]

    @property
    def units(self) -> dict[str, float]:
        """Of all candidates together: the largest r of each, by code."""
        found: dict[str, float] = {}
        for candidate in self.candidates:
            for code, intensity in candidate.units.items():
                found[code] = max(intensity, found.get(code, 0.0))
        return dict(sorted(found.items()))


def retrieve(entries: Sequence[Entry], k: int, intensity: tuple[float, float], draw: np.random.Generator) -> Retrieved:
    """At most k of the entries, without replacement, each as likely as any other; in each r_ij = s_j a_ij, with a_ij
    the entry's own intensities and s_j uniform in the range `intensity`, one for each action unit."""
    chosen = [entries[at] for at in draw.choice(len(entries), size=min(k, len(entries)), replace=False)]
    codes = sorted({code for entry in chosen for code in entry.units})
    shown = dict(zip(codes, draw.uniform(*intensity, size=len(codes)).tolist(), strict=True))
    return Retrieved([_described(entry, shown, draw) for entry in chosen])


def modifier(r: float, draw: np.random.Generator) -> str:
    """An adverb for an intensity in [0, 1], from "faintly" to "sharply"."""
    return one_of(level(r).adverbs, draw)


def adjective(units: Mapping[str, float], draw: np.random.Generator) -> str:
    """The same for an expression whose units have these intensities, from their mean."""
    return one_of(level(sum(units.values()) / len(units)).adjectives, draw)


def level(r: float) -> Level:
    assert 0.0 <= r <= 1.0, r
    return next(level for level in LEVELS if r <= level.most)


def one_of(options: Sequence[Option], draw: np.random.Generator) -> Option:
    return options[draw.integers(len(options))]


def _described(entry: Entry, shown: Mapping[str, float], draw: np.random.Generator) -> Described:
    units = {code: own * shown[code] for code, own in entry.units.items()}
    text = entry.description
    for code, r in units.items():
        text = text.replace(f"{{{code}}}", modifier(r, draw))
    return Described(units, text)
