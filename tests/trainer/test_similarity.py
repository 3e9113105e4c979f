import math

import numpy as np
import pytest
import torch

from trainer.selection import similarity
from trainer.selection.feedback import Scored


def reference(features: np.ndarray, targets: np.ndarray, k: int, own: bool = False) -> list[float]:
    """Mean cosine to the k nearest targets, one pair at a time in float64."""
    found = []
    for i, a in enumerate(features):
        cosines = [
            float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
            for j, b in enumerate(targets)
            if not (own and i == j)
        ]
        found.append(sum(sorted(cosines)[-k:]) / min(k, len(cosines)))
    return found


def test_by_hand():
    targets = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    to = similarity.to_targets(torch.tensor([[5.0, 5.0], [2.0, 0.0]]), targets, 2)
    torch.testing.assert_close(to, torch.tensor([math.sqrt(0.5), 0.5]))
    among = similarity.among(targets, 1)
    torch.testing.assert_close(among, torch.tensor([0.0, 0.0, 0.0]))  # at right angles to the nearest other


@pytest.mark.parametrize("rows", [3, 1024])  # of targets compared at a time
def test_against_one_pair_at_a_time(rows: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(similarity, "ROWS", rows)
    draw = np.random.default_rng(0)
    features, targets = draw.normal(size=(7, 5)), draw.normal(size=(20, 5))
    x, y = torch.from_numpy(features).float(), torch.from_numpy(targets).float()
    expected = torch.tensor(reference(features, targets, 15), dtype=torch.float32)
    torch.testing.assert_close(similarity.to_targets(x, y, 15), expected)
    expected = torch.tensor(reference(targets, targets, 15, own=True), dtype=torch.float32)
    torch.testing.assert_close(similarity.among(y, 15), expected)


def test_more_neighbours_than_there_are_count_those_there_are():
    draw = np.random.default_rng(1)
    features, targets = draw.normal(size=(3, 4)), draw.normal(size=(5, 4))
    x, y = torch.from_numpy(features), torch.from_numpy(targets)
    torch.testing.assert_close(similarity.to_targets(x, y, 15).tolist(), reference(features, targets, 5))
    torch.testing.assert_close(similarity.among(y, 15).tolist(), reference(targets, targets, 4, own=True))
    assert similarity.among(y[:1], 15).tolist() == [0.0]


def test_the_criterion_asks_first_for_what_is_most_like_the_others():
    """Three of a kind and an outlier; logits are not looked at."""
    features = torch.tensor([[1.0, 0.1], [-1.0, 0.2], [1.0, 0.0], [1.0, -0.05]])
    samples = Scored(
        torch.full((4, 2), math.nan), torch.zeros(4, dtype=torch.long), lambda: features, torch.Generator(), 2
    )
    scores = similarity.similarity(samples)
    assert scores.argmax() == 1 and scores[2] == scores.min() and scores.dtype == torch.float64
