from __future__ import annotations

import numpy as np
import pytest
import torch

from trainer.privacy import distances
from trainer.privacy.distances import limits, nearest

TARGETS = torch.tensor([[0, 0], [10, 0], [0, 10]], dtype=torch.uint8)


def brute_force(queries: np.ndarray, targets: np.ndarray, may: np.ndarray) -> tuple[list[float], list[int]]:
    """One pair at a time; `may`: which pairs are compared."""
    found, index = [], []
    for row, query in enumerate(queries.astype(np.float64)):
        pairs = [(np.sqrt(((query - other) ** 2).sum()), j) for j, other in enumerate(targets) if may[row, j]]
        best = min(pairs, default=(np.inf, -1))
        found.append(best[0])
        index.append(best[1])
    return found, index


def test_distances_by_hand():
    found = nearest(torch.tensor([[3, 4], [10, 1], [255, 0]], dtype=torch.uint8), TARGETS)
    assert found.distance.tolist() == [5.0, 1.0, 245.0]
    assert found.index.tolist() == [0, 1, 1]


def test_only_equal_labels_are_compared():
    queries, labels = torch.tensor([[3, 4], [3, 4], [3, 4]], dtype=torch.uint8), torch.tensor([0, 1, 2])
    found = nearest(queries, TARGETS, labels=(labels, torch.tensor([0, 1, 1])))
    assert found.distance.tolist() == [5.0, pytest.approx(45**0.5), torch.inf]  # (3, 4) - (0, 10)
    assert found.index.tolist() == [0, 2, -1]


def test_of_equally_near_ones_the_first():
    copies = torch.zeros(5, 2)
    assert nearest(torch.ones(1, 2), copies).index.tolist() == [0]


def test_a_set_with_itself_leaves_each_one_out():
    found = nearest(TARGETS, TARGETS, own=torch.arange(3))
    assert found.distance.tolist() == [10.0, 10.0, 10.0]
    assert found.index.tolist() == [1, 0, 0]
    part = nearest(TARGETS[1:], TARGETS, own=torch.tensor([1, 2]))  # one process's part of them
    assert part.index.tolist() == [0, 0]
    alone = nearest(TARGETS, TARGETS, labels=(torch.tensor([0, 0, 1]), torch.tensor([0, 0, 1])), own=torch.arange(3))
    assert alone.distance.tolist() == [10.0, 10.0, torch.inf]


@pytest.mark.parametrize("values", [2**24, 50, 7])
@pytest.mark.parametrize("kind", ["pixels", "features"])
def test_every_chunk_size_agrees_with_brute_force(values: int, kind: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(distances, "CHUNK_VALUES", values)
    draw = np.random.default_rng(0)
    queries, targets = draw.normal(size=(13, 6)), draw.normal(size=(17, 6))
    if kind == "pixels":
        queries, targets = (np.clip(128 + 60 * rows, 0, 255).astype(np.uint8) for rows in (queries, targets))
    one, other = draw.integers(4, size=13), draw.integers(3, size=17)
    pairs = {
        "all": ({}, np.ones((13, 17), dtype=bool)),
        "class": ({"labels": (torch.tensor(one), torch.tensor(other))}, one[:, None] == other),
    }
    for options, may in pairs.values():
        found = nearest(torch.tensor(queries), torch.tensor(targets), **options)
        distance, index = brute_force(queries, targets, may)
        assert found.distance.tolist() == pytest.approx(distance, rel=1e-12)
        assert found.index.tolist() == index
    alike, apart = other[:, None] == other, ~np.eye(17, dtype=bool)
    pairs = {"all": ({}, apart), "class": ({"labels": (torch.tensor(other),) * 2}, alike & apart)}
    for options, may in pairs.values():
        found = nearest(torch.tensor(targets), torch.tensor(targets), own=torch.arange(17), **options)
        distance, index = brute_force(targets, targets, may)
        assert found.distance.tolist() == pytest.approx(distance, rel=1e-12)
        assert found.index.tolist() == index


def test_pixels_far_from_zero_are_compared_exactly():
    """Where single precision would lose the difference in the squares."""
    bright = torch.full((1, 12288), 255, dtype=torch.uint8)
    other = bright.clone()
    other[0, 7] = 254
    assert nearest(bright, torch.cat([other, bright])).index.tolist() == [1]
    assert nearest(bright, other).distance.tolist() == [1.0]


def test_limits_of_classes_by_hand():
    apart = torch.tensor([1.0, 2.0, 3.0, 10.0, 20.0, torch.inf], dtype=torch.float64)
    found = limits(apart, torch.tensor([0, 0, 0, 1, 1, 2]), 4, 0.25)
    pooled = 2.0  # of 1, 2, 3, 10, 20: what a class of one sample goes by, and one of none
    assert found.tolist() == pytest.approx([1.5, 12.5, pooled, pooled])
