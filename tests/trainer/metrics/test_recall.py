"""Recalls by hand, and against a plain count of any labels."""

from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.metrics.recall import BySubject, by_subject, confusion, recalls, uar, war

LABELS = torch.tensor([0, 0, 0, 0, 1, 1, 3])
PREDICTED = torch.tensor([0, 0, 0, 2, 0, 1, 0])


def test_by_hand():
    table = confusion(LABELS, PREDICTED, 4)
    assert table.tolist() == [[3, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    assert recalls(table) == [0.75, 0.5, None, 0.0]
    assert uar(table) == pytest.approx((0.75 + 0.5 + 0.0) / 3)
    assert war(table) == pytest.approx(4 / 7)


@given(pairs=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60))
def test_against_a_plain_count(pairs: list[tuple[int, int]]):
    labels, predicted = (torch.tensor(column) for column in zip(*pairs, strict=True))
    table = confusion(labels, predicted, 5)
    for true in range(5):
        for found in range(5):
            assert table[true, found] == pairs.count((true, found))
    of = {label: [found == label for true, found in pairs if true == label] for label in range(5)}
    assert recalls(table) == [statistics.mean(rights) if rights else None for rights in of.values()]
    assert uar(table) == pytest.approx(statistics.mean(statistics.mean(rights) for rights in of.values() if rights))
    assert war(table) == pytest.approx(statistics.mean(true == found for true, found in pairs))


def test_by_subject():
    subjects = ["a", "a", "b", None, "b", "b", "c"]
    found = by_subject(LABELS, PREDICTED, subjects)
    parts = [1.0, 2 / 3, 0.0]  # of a 2 of 2, of b 2 of 3, of c none
    assert found == BySubject(3, pytest.approx(statistics.mean(parts)), pytest.approx(statistics.pstdev(parts)))
    assert by_subject(LABELS, PREDICTED, [None] * 7) is None
    assert by_subject(LABELS[:1], PREDICTED[:1], ["a"]) == (1, 1.0, 0.0)
