from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.caption_parser import same
from agent.caption_template import MOST, versions

PURPLE = "a dog walking through a field of purple flowers"


@pytest.mark.parametrize(
    "caption", [None, "", PURPLE, "dog", "a dog at dusk seen up close in a garden", "at dusk " * 30]
)
def test_a_thousand_short_and_distinct_versions(caption: str | None):
    found = list(islice(versions(caption, "american bulldog", 10), MOST))
    assert len(found) == MOST
    assert len({same(version) for version in found} - {same(caption or "")}) == MOST
    assert max(len(version.split()) for version in found) <= 10


@settings(max_examples=25)
@given(st.text(max_size=80), st.integers(6, 12))
def test_any_caption_has_a_thousand(caption: str, most_words: int):
    found = list(islice(versions(caption, "dog", most_words), MOST))
    assert len({same(version) for version in found} - {same(caption)}) == MOST
    assert max(len(version.split()) for version in found) <= most_words


def test_the_same_again_and_others_for_others():
    five = list(islice(versions(PURPLE, "dog", 10), 5))
    assert five == list(islice(versions(PURPLE, "dog", 10), 5))
    assert five != list(islice(versions(PURPLE, "cat", 10), 5))


def test_the_scene_is_kept_as_far_as_there_is_room():
    assert all(
        version.startswith("a dog walking through a field") for version in islice(versions(PURPLE, "dog", 10), 72)
    )
    assert all(version.startswith("a dog ") for version in versions("a dog", "dog", 10))


def test_what_the_caption_says_is_not_said_again():
    assert not [version for version in versions("a dog at dusk", "dog", 10) if version.count("at dusk") > 1]
