"""FVD by groups: their mean and spread, and what becomes of groups that cannot be measured."""

from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.video_quality.frechet import frechet_distance
from trainer.video_quality.quality import by_group, quality


def features(n: int, seed: int, d: int = 3) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_groups_are_measured_each_on_their_own_and_averaged():
    pair = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)  # variance 2
    generated = torch.cat([pair, 10 + 2 * pair, pair])
    real = torch.cat([pair + 3, pair + 10, pair])
    found = by_group(generated, real, [*"aabbcc"], [*"aabbcc"])
    assert found.distances == pytest.approx({"a": 9.0, "b": 2.0, "c": 0.0}, abs=1e-12)  # b: (sqrt 8 - sqrt 2)^2
    assert found.mean == pytest.approx(11 / 3)
    assert found.deviation == pytest.approx(statistics.stdev([9.0, 2.0, 0.0]))
    assert (found.left_out, found.unassigned, found.note) == ({}, 0, None)


def test_groups_with_one_clip_on_a_side_or_on_one_side_only_are_left_out_and_told():
    generated, real = features(7, 0), features(8, 1)
    own, other = ["a", "a", "a", "one", "two", "two", None], ["a", "a", "one", "one", "real", "real", "two", None]
    found = by_group(generated, real, own, other)
    alone = frechet_distance(generated[:3], real[:2])
    assert found.distances == {"a": alone} and found.mean == alone and found.deviation is None
    assert found.left_out == {
        "one": "1 generated and 2 real clips; it takes two of each",
        "real": "0 generated and 2 real clips; it takes two of each",
        "two": "2 generated and 1 real clips; it takes two of each",
    }
    assert found.unassigned == 2 and found.note is None


def test_where_no_group_can_be_measured_there_is_no_mean_but_a_note():
    found = by_group(features(2, 0), features(2, 1), ["a", "b"], ["a", "b"])
    assert (found.mean, found.deviation, found.distances) == (None, None, {})
    assert found.note == "none of 2 groups has two generated and two real clips"
    unknown = by_group(features(2, 0), features(3, 1), [None, None], [None, None, None])
    assert (unknown.mean, unknown.note, unknown.unassigned) == (None, "no clip's group is known", 5)


def test_all_three_of_two_sets():
    generated, real = features(6, 0), features(8, 1)
    subjects = (["s", "s", "t", "t", "t", "s"], ["s"] * 4 + ["t"] * 4)
    texts = (["joy"] * 6, ["joy"] * 4 + ["fear"] * 4)
    found = quality(generated, real, subjects, texts)
    assert (found.generated, found.real) == (6, 8)
    assert found.fvd == frechet_distance(generated, real)
    assert found.sfvd.distances["t"] == frechet_distance(generated[2:5], real[4:])
    assert found.tfvd.distances == {"joy": frechet_distance(generated, real[:4])}
    assert list(found.tfvd.left_out) == ["fear"]
    assert quality(generated[:1], real, (["s"], subjects[1]), (["joy"], texts[1])).fvd is None


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=2, max_size=12), st.integers(0, 1000))
def test_a_set_against_itself_is_zero_in_every_group_and_every_group_is_accounted_for(groups: list, seed: int):
    clips = features(len(groups), seed)
    found = by_group(clips, clips, groups, groups)
    assert found.distances.keys() | found.left_out.keys() == {name for name in groups if name is not None}
    assert all(value < 1e-9 for value in found.distances.values())
    assert found.unassigned == 2 * groups.count(None)
    assert (found.mean is None) == (not found.distances) == (found.note is not None)
