from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.expressions.knowledge import Entry, KnowledgeBase
from agent.expressions.retrieve import LEVELS, adjective, level, modifier, retrieve
from agent.expressions.settings import ExpressionsConfig

ENTRIES = [Entry("e", {f"AU0{n}": 0.5, "AU12": 1.0}, f"a {{AU0{n}}} b {{AU12}}") for n in (1, 2, 4, 5, 6)]
BASE = KnowledgeBase.open(ExpressionsConfig())


def test_every_set_of_k_entries_is_as_likely(k: int = 2, draws: int = 4000):
    draw = np.random.default_rng(0)
    found = Counter(
        frozenset(tuple(c.units) for c in retrieve(ENTRIES, k, (0.5, 0.5), draw).candidates) for _ in range(draws)
    )
    expected = draws / 10  # 5 choose 2
    assert len(found) == 10 and all(len(chosen) == k for chosen in found)
    assert sum((count - expected) ** 2 / expected for count in found.values()) < 27.9  # 99.9 %, 9 degrees of freedom


@given(
    st.sampled_from(sorted(BASE.entries)), st.integers(1, 9), st.integers(0, 2**63 - 1),
    st.tuples(st.floats(0.01, 0.5), st.floats(0.5, 1.0)),
)  # fmt: skip
def test_what_is_retrieved(emotion: str, k: int, seed: int, intensity: tuple[float, float]):
    entries = BASE.of(emotion)
    found = retrieve(entries, k, intensity, np.random.default_rng(seed))
    assert found == retrieve(entries, k, intensity, np.random.default_rng(seed))
    assert len(found.candidates) == min(k, len(entries))
    of = {tuple(entry.units): entry for entry in entries}
    chosen = [of[tuple(candidate.units)] for candidate in found.candidates]
    assert len({id(entry) for entry in chosen}) == len(chosen)  # without replacement
    scales: dict[str, float] = {}
    for entry, candidate in zip(chosen, found.candidates, strict=True):
        for code, r in candidate.units.items():
            scale = r / entry.units[code]
            assert intensity[0] - 1e-9 <= scale <= intensity[1] + 1e-9
            assert scales.setdefault(code, scale) == pytest.approx(scale)  # one s for each action unit
        adverbs = [adverb for r in candidate.units.values() for adverb in level(r).adverbs]
        assert "{" not in candidate.text and any(adverb in candidate.text for adverb in adverbs)
    assert found.units == {
        code: max(c.units[code] for c in found.candidates if code in c.units)
        for code in sorted({code for c in found.candidates for code in c.units})
    }


def test_modifiers_go_from_faintly_to_sharply():
    draw = np.random.default_rng(0)
    spoken = [{modifier(r, draw) for _ in range(50)} for r in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)]
    assert spoken[0] == spoken[1] == {"faintly", "minimally"} and spoken[5] == spoken[6] == {"sharply", "intensely"}
    assert "slightly" in spoken[2] and "moderately" in spoken[3] and "markedly" in spoken[4]
    assert all(a.isdisjoint(b) for a, b in itertools.combinations(spoken[1:6], 2))
    assert [level(each.most) for each in LEVELS] == list(LEVELS)
    assert adjective({"AU01": 0.1, "AU02": 0.9}, draw) in {"moderate", "visible"}  # of the mean


def test_each_places_adverb_is_that_of_its_unit():
    entry = Entry("e", {"AU01": 0.1, "AU02": 1.0}, "inner {AU01} outer {AU02}")
    (found,) = retrieve([entry], 3, (1.0, 1.0), np.random.default_rng(3)).candidates
    _, inner, _, outer = found.text.split()
    assert inner in LEVELS[0].adverbs and outer in LEVELS[4].adverbs
