from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.metrics.verification import best_threshold, similarity, verify


def accuracy(scores: torch.Tensor, same: torch.Tensor, threshold: float) -> float:
    return sum((s >= threshold) == t for s, t in zip(scores.tolist(), same.tolist(), strict=True)) / len(scores)


def plain(scores: torch.Tensor, same: torch.Tensor, fold: torch.Tensor) -> list[float]:
    """Accuracy of each fold, every threshold tried in turn."""
    found = []
    for number in sorted(set(fold.tolist())):
        held = fold == number
        others = sorted(set(scores[~held].tolist()))
        cuts = [others[0] - 1.0, *((a + b) / 2 for a, b in itertools.pairwise(others)), others[-1] + 1.0]
        best = max(cuts, key=lambda cut: accuracy(scores[~held], same[~held], cut))  # the first of several
        found.append(accuracy(scores[held], same[held], best))
    return found


def test_by_hand():
    """Fold 0's threshold comes from fold 1 and the other way round."""
    scores = torch.tensor([0.9, 0.4, 0.8, 0.2])
    same = torch.tensor([True, False, True, False])
    found = verify(scores, same, torch.tensor([0, 0, 1, 1]))
    assert found.thresholds == pytest.approx([0.5, 0.65])
    assert (found.accuracy, found.deviation) == (1.0, 0.0)
    swapped = verify(scores, same, torch.tensor([0, 1, 1, 0]))  # fold 0: 0.9 and 0.2, fold 1: 0.4 and 0.8
    assert swapped.thresholds == pytest.approx([0.6, 0.55])
    third = verify(torch.tensor([0.9, 0.1, 0.3, 0.2]), same, torch.tensor([0, 0, 1, 1]))
    assert third.thresholds == pytest.approx([0.25, 0.5]) and third.accuracy == pytest.approx(0.75)
    assert third.deviation == pytest.approx(0.25)


@given(
    st.lists(st.tuples(st.integers(-4, 4), st.booleans(), st.integers(0, 3)), min_size=4, max_size=30).filter(
        lambda rows: len({row[2] for row in rows}) > 1
    )
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_it_is_every_threshold_tried(rows: list[tuple[int, bool, int]]):
    scores, same, fold = (torch.tensor(column) for column in zip(*rows, strict=True))
    found, wanted = verify(scores.float(), same, fold), plain(scores.float(), same, fold)
    assert found.accuracy == pytest.approx(sum(wanted) / len(wanted), abs=1e-12)
    mean = sum(wanted) / len(wanted)
    assert found.deviation == pytest.approx((sum((w - mean) ** 2 for w in wanted) / len(wanted)) ** 0.5, abs=1e-12)


def test_pairs_of_one_kind_only_put_the_threshold_past_all():
    scores = torch.tensor([0.3, 0.7])
    assert best_threshold(scores, torch.tensor([True, True])) < 0.3
    assert best_threshold(scores, torch.tensor([False, False])) > 0.7


def test_neighbouring_floats_are_told_apart():
    low = torch.tensor(0.5)
    high = torch.nextafter(low, torch.tensor(1.0))
    cut = best_threshold(torch.stack([low, high]), torch.tensor([False, True]))
    assert low.item() < cut < high.item()


def test_scores_look_at_directions_only():
    first, second = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[6.0, 8.0], [0.0, 2.0]])
    torch.testing.assert_close(similarity(first, second), torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(similarity(first, second, "euclidean"), torch.tensor([0.0, -(2.0**0.5)]))
