from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

from trainer.privacy.intervals import Z, bootstrap, wilson
from trainer.privacy.membership import auc, auc_interval, placements, recognised, roc, variance

MEMBERS = torch.tensor([3.0, 2.0, 2.0, 5.0])
OTHERS = torch.tensor([1.0, 2.0, 4.0])


def scores(seed: int, members: int, others: int, apart: float) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(members, generator=draw).double() + apart, torch.randn(others, generator=draw).double()


def test_the_area_by_hand():
    below, above = placements(MEMBERS, OTHERS)
    assert below.tolist() == pytest.approx([2 / 3, 1.5 / 3, 1.5 / 3, 1.0])
    assert above.tolist() == pytest.approx([1.0, 3 / 4, 1 / 4])
    assert auc(MEMBERS, OTHERS) == pytest.approx(8 / 12) == pytest.approx(above.mean().item())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ties", [False, True])
def test_the_area_is_that_of_scikit_learn_and_of_counting_pairs(seed: int, ties: bool):
    members, others = scores(seed, 37, 23, 0.5)
    if ties:
        members, others = members.round(), others.round()
    truth = [1] * 37 + [0] * 23
    assert auc(members, others) == pytest.approx(roc_auc_score(truth, torch.cat([members, others]).numpy()))
    pairs = [(m > o) + 0.5 * (m == o) for m in members.tolist() for o in others.tolist()]
    assert auc(members, others) == pytest.approx(np.mean(pairs))


@pytest.mark.parametrize("ties", [False, True])
def test_the_curve_is_that_of_scikit_learn(ties: bool):
    members, others = scores(3, 30, 40, 1.0)
    if ties:
        members, others = members.round(), others.round()
    false, true = roc(members, others)
    expected = roc_curve([1] * 30 + [0] * 40, torch.cat([members, others]).numpy(), drop_intermediate=False)
    assert false.tolist() == pytest.approx(expected[0].tolist())
    assert true.tolist() == pytest.approx(expected[1].tolist())
    assert torch.trapezoid(true, false).item() == pytest.approx(auc(members, others))


def test_delongs_variance_is_that_of_counting_pairs():
    """The definition (DeLong et al. 1988, section 3), a pair at a time."""
    members, others = (values.round() for values in scores(1, 12, 9, 0.7))
    kernel = np.array([[(m > o) + 0.5 * (m == o) for o in others.tolist()] for m in members.tolist()])
    expected = kernel.mean(1).var(ddof=1) / 12 + kernel.mean(0).var(ddof=1) / 9
    assert variance(members, others) == pytest.approx(expected)


def test_delongs_variance_is_that_of_many_sets():
    found = [scores(seed, 60, 60, 0.8) for seed in range(2000)]
    areas = np.array([auc(*pair) for pair in found])
    assert np.mean([variance(*pair) for pair in found]) == pytest.approx(areas.var(), rel=0.1)


@pytest.mark.parametrize(("apart", "images"), [(0.0, 15), (0.0, 100), (0.7, 40), (2.0, 30), (3.0, 20)])
def test_the_interval_covers_the_true_area_as_often_as_it_says(apart: float, images: int):
    """Normal scores, whose true area is known."""
    truth = 0.5 * (1 + math.erf(apart / 2))
    covers = []
    for seed in range(1000):
        low, high = auc_interval(*scores(seed, images, images, apart))
        covers.append(low <= truth <= high)
    assert 0.93 <= np.mean(covers) <= 0.995


def test_the_interval_covers_where_half_of_the_members_were_learnt_by_heart():
    """Scores that are of two kinds: a formula that knows the area alone would be far too sure."""
    covers = []
    for seed in range(1000):
        members, others = scores(seed, 40, 40, 0.0)
        members[torch.rand(40, generator=torch.Generator().manual_seed(seed + 5000)) < 0.5] += 100.0
        low, high = auc_interval(members, others)
        covers.append(low <= 0.75 <= high)
    assert 0.93 <= np.mean(covers) <= 0.975


def test_a_perfect_attack_on_few_images_is_not_called_certain():
    low, high = auc_interval(torch.ones(5), torch.zeros(5))
    assert high == pytest.approx(1.0) and low == pytest.approx(10 / (10 + Z**2))
    wide = auc_interval(torch.ones(2), torch.zeros(2))
    assert wide[0] < low


def test_members_recognised_at_few_errors():
    members, others = torch.arange(200.0), torch.arange(200.0) - 100.5
    found = recognised(members, others)
    assert found.false_positive_rate == 0.01
    assert found.true_positive_rate == 103 / 200  # 97 to 199: two of the others, 97.5 and 98.5, score as high
    assert found.interval == wilson(103 / 200, 200)


def test_with_few_others_the_smallest_rate_that_they_allow():
    found = recognised(torch.tensor([5.0, 4.0, 3.0, 0.0]), torch.tensor([4.5, 1.0, 1.0, 1.0]))
    assert found.false_positive_rate == 0.25
    assert found.true_positive_rate == 0.75


def test_wilsons_interval_is_the_published_one():
    """Newcombe 1998, Table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    published = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (hits, trials), expected in published.items():
        assert wilson(hits / trials, trials) == pytest.approx(expected, abs=5e-5)


def test_the_bootstrap_covers_and_repeats_itself():
    def difference(one: Tensor, other: Tensor) -> Tensor:
        return one.mean(-1) - other.mean(-1)

    covers = []
    for seed in range(200):
        one, other = scores(seed, 60, 50, 1.5)
        low, high = bootstrap(difference, one, other, torch.Generator().manual_seed(seed))
        covers.append(low <= 1.5 <= high)
    assert 0.89 <= np.mean(covers) <= 0.98
    again = bootstrap(difference, one, other, torch.Generator().manual_seed(seed))
    assert again == (low, high)
