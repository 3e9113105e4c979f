"""Which units go together, by hand; and the file of them."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from generator_service.faces import statistics
from generator_service.faces.statistics import patterns

OPTIONS = {"threshold": 0.3, "min_support": 0.3, "max_units": 5}


def test_frequent_combinations_with_their_mean_intensities():
    clips = [
        {"AU04": 0.5, "AU09": 0.9, "AU17": 0.2},
        {"AU04": 0.7, "AU09": 0.6},
        {"AU09": 0.3, "AU25": 0.8},
        {"AU25": 0.4, "AU01": 0.6},
        {},
    ]
    assert patterns(clips, **OPTIONS) == [  # AU09 alone is in three of five, but within a larger combination
        {"units": {"AU04": 0.6, "AU09": 0.75}, "part": 0.4},
        {"units": {"AU25": 0.6}, "part": 0.4},
    ]


def test_one_clip_is_no_pattern():
    assert patterns([{"AU12": 0.9}], **OPTIONS) == []
    assert patterns([], **OPTIONS) == []


def test_only_the_strongest_units_are_combined():
    clips = [{f"AU{number:02}": number / 20 for number in range(6, 20)}] * 2
    (found, *_) = patterns(clips, threshold=0.3, min_support=0.5, max_units=6)
    assert set(found["units"]) <= {f"AU{number:02}" for number in range(12, 20)}


@settings(max_examples=40)
@given(st.lists(st.dictionaries(st.sampled_from("abcde"), st.floats(0.3, 1), max_size=5), max_size=12))
def test_every_frequent_combination_is_within_one_that_is_told(clips):
    told = [set(pattern["units"]) for pattern in patterns(clips, **OPTIONS)]
    for size in range(1, 6):
        for units in combinations("abcde", size):
            count = sum(set(units) <= set(clip) for clip in clips)
            frequent = count >= 2 and count >= 0.3 * len(clips)
            assert frequent == any(set(units) <= other for other in told)
    assert not any(one < other for one in told for other in told)


def test_the_file_says_units_clips_and_patterns(tmp_path: Path):
    found = patterns([{"AU12": 0.8}] * 2, **OPTIONS)
    path = statistics.write(tmp_path, ["AU06", "AU12"], {"happy": (2, found), "sad": (0, [])})
    assert path == tmp_path / "action_units.json"
    assert json.loads(path.read_text()) == {
        "units": ["AU06", "AU12"],
        "classes": {
            "happy": {"clips": 2, "patterns": [{"units": {"AU12": 0.8}, "part": 1.0}]},
            "sad": {"clips": 0, "patterns": []},
        },
    }
