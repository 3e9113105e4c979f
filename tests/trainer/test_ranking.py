import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.selection.ranking import lowest, lowest_of_each_class, part

RATIOS = [(0.1, 0.1, 1), (0.25, 0.25, 1), (0.5, 0.5, 1), (1.0, 0.2, 5), (0.5, 0.1, 5), (1.0, 0.25, 4), (1.0, 0.5, 2)]
TRAINING_SETS = {"Pets": 3680, "CUB": 5994, "Flowers": 2040, "Birdsnap": 47386, "Food": 75750, "IN100": 126689}


@pytest.mark.parametrize(("ratio", "fraction", "each"), RATIOS)
@pytest.mark.parametrize("n", TRAINING_SETS.values(), ids=TRAINING_SETS)
def test_one_to_r_asks_for_r_images_a_real_sample(ratio: float, fraction: float, each: int, n: int):
    """GenDataAgent's ratios 1:0.1 to 1:1 (Tables 9 and 15) on its datasets (Table 11): k m is r |T|, rounded up to
    whole samples, so less than m too many."""
    asked = part(fraction, n) * each
    assert -1e-6 <= asked - ratio * n < each
    if n * fraction == round(n * fraction):
        assert asked == round(ratio * n)


def test_a_part_is_rounded_up_and_never_nothing():
    assert [part(0.2, n) for n in (1, 5, 6, 10)] == [1, 1, 2, 2]
    assert part(0.1, 30) == 3 and part(0.29, 100) == 29  # 0.1 * 30 is 3.000...04
    assert part(1e-6, 7) == 1 and part(1.0, 7) == 7 and part(0.5, 0) == 0


def test_of_each_class_its_own_part_lowest_first_over_all():
    scores = torch.tensor([0.9, 0.1, 0.8, 0.2, 0.7, 0.05, 0.3])
    labels = torch.tensor([0, 1, 0, 1, 0, 1, 3])  # nothing of class 2
    assert lowest_of_each_class(scores, labels, 0.5).tolist() == [5, 1, 6, 4, 2]
    assert lowest(scores, part(0.5, 7)).tolist() == [5, 1, 3, 6]  # the whole set's: none of class 0


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=40), st.floats(0.01, 1.0))
def test_each_class_is_ranked_on_its_own(rows: list[tuple[int, int]], fraction: float):
    scores, labels = torch.tensor([float(s) for s, _ in rows]), torch.tensor([label for _, label in rows])
    chosen = lowest_of_each_class(scores, labels, fraction).tolist()
    for label in {label for _, label in rows}:
        members = sorted((i for i, row in enumerate(rows) if row[1] == label), key=lambda i: (rows[i][0], i))
        k = math.ceil(fraction * len(members) - 1e-9)
        assert [i for i in chosen if rows[i][1] == label] == members[:k]
    assert [rows[i][0] for i in chosen] == sorted(rows[i][0] for i in chosen)
