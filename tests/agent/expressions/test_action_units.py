from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.expressions.action_units import ACTION_UNITS, PARTS, named, parts_in, untagged

OPENFACE = (1, 2, 4, 5, 6, 7, 9, 10, 12, 14, 15, 17, 20, 23, 25, 26, 28, 45)
PYFEAT = (1, 2, 4, 5, 6, 7, 9, 10, 11, 12, 14, 15, 17, 20, 23, 24, 25, 26, 28, 43)


def test_those_that_readers_tell_of_are_known():
    assert {f"AU{number:02d}" for number in (*OPENFACE, *PYFEAT)} <= ACTION_UNITS.keys()


@pytest.mark.parametrize("code", ACTION_UNITS)
def test_a_phrase_has_one_place_for_an_adverb_and_speaks_of_the_parts_it_moves(code: str):
    unit = ACTION_UNITS[code]
    assert unit.phrase.count("{}") == 1 and set(unit.parts) <= PARTS.keys()
    spoken = parts_in(unit.phrase)
    assert spoken and spoken & set(unit.parts)
    assert parts_in(unit.name) <= set(unit.parts) | {"chin", "mouth"}


@pytest.mark.parametrize(
    ("text", "codes"),
    [
        ("inner brows raised (AU01), jaw drop (AU98)", ["AU01", "AU98"]),
        ("AU1+2 and au 4", ["AU01", "AU02", "AU04"]),
        ("AUs 1, 2 and 5B", ["AU01", "AU02", "AU05"]),
        ("[AU-12C; AU_25] AUR14", ["AU12", "AU25", "AU14"]),
        ("AU4/AU7 & AU04", ["AU04", "AU07"]),
        ("AU: 05, Action Unit 12 and action units 4, 7", ["AU05", "AU12", "AU04", "AU07"]),
        ("Austria has 4 brows, MAU4, AU, gaude 12", []),
    ],
)
def test_codes_are_found_however_they_are_written(text: str, codes: list[str]):
    assert named(text) == codes


@pytest.mark.parametrize(
    ("text", "without"),
    [
        ("inner brows raise sharply (AU01), lids tighten (AU06) .", "inner brows raise sharply, lids tighten."),
        ("brows up (AU01, AU02) and (lid raiser, AU05) eyes wide", "brows up and eyes wide"),
        ("AU04: brows lower, AU07", ": brows lower,"),
        ("eyes (a bit) wide", "eyes (a bit) wide"),
        ("A(AU1)U 2 up", "A U 2 up"),
        ("AU (AU1) 2 up", "up"),
        ("lips curl (Action Unit 12), lids rise (AU: 05)", "lips curl, lids rise"),
    ],
)
def test_codes_are_taken_out_with_what_brackets_them(text: str, without: str):
    assert untagged(text) == without


PIECES = st.sampled_from(
    ["AU", "au", "action unit", "s", " ", ":", "1", "04", "12C", "+", ",", "(", ")", "[", "]", "brows", "and", "L", "-"]
)


@given(st.lists(PIECES, max_size=20).map("".join) | st.text(max_size=60))
def test_nothing_that_is_untagged_names_an_action_unit(text: str):
    without = untagged(text)
    assert named(without) == []
    assert untagged(without) == without
