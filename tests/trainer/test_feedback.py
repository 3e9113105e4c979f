import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.selection.feedback import Scored, entropy, marginal, random
from trainer.selection.ranking import lowest


def scored(logits: torch.Tensor, labels: torch.Tensor, generator: torch.Generator | None = None) -> Scored:
    """Samples whose features nobody may ask for."""
    return Scored(logits, labels, features=lambda: 1 / 0, generator=generator or torch.Generator())


def test_marginal_is_the_softmax_probability_of_the_true_class():
    logits = torch.tensor([[0.0, math.log(3.0)], [math.log(3.0), 0.0], [1.0, 1.0]])
    scores = marginal(scored(logits, torch.tensor([1, 1, 0])))
    torch.testing.assert_close(scores, torch.tensor([0.75, 0.25, 0.5], dtype=torch.float64), rtol=1e-6, atol=0)


def test_marginal_still_ranks_samples_that_are_certain_in_float32():
    logits = torch.tensor([[30.0, 0.0], [20.0, 0.0], [25.0, 0.0]])
    assert logits.softmax(1)[:, 0].unique().numel() == 1
    assert lowest(marginal(scored(logits, torch.zeros(3, dtype=torch.long))), 3).tolist() == [1, 2, 0]


def test_entropy_ranks_the_least_certain_prediction_lowest():
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0], [100.0, -100.0]])
    scores = entropy(scored(logits, torch.tensor([0, 0, 0])))
    by_hand = [0.25 * math.log(0.25) + 0.75 * math.log(0.75), -math.log(2.0), 0.0]
    torch.testing.assert_close(scores, torch.tensor(by_hand, dtype=torch.float64), rtol=1e-6, atol=1e-12)
    assert lowest(scores, 1).tolist() == [1]


def test_random_depends_on_the_generator_alone():
    y = torch.zeros(1000, dtype=torch.long)
    state = torch.get_rng_state()
    first = random(scored(torch.zeros(1000, 3), y, torch.Generator().manual_seed(5)))
    again = random(scored(torch.randn(1000, 3, generator=torch.Generator()), y, torch.Generator().manual_seed(5)))
    other = random(scored(torch.zeros(1000, 3), y, torch.Generator().manual_seed(6)))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())
    assert abs(first.mean().item() - 0.5) < 0.05 and first.min() >= 0.0 and first.max() < 1.0


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), max_size=40), st.integers(0, 50))
def test_lowest_is_the_head_of_a_stable_sort(values, k):
    expected = sorted(range(len(values)), key=lambda i: (values[i], i))[:k]
    assert lowest(torch.tensor(values, dtype=torch.float32), k).tolist() == expected
