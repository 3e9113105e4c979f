import itertools
import math

import pytest
import torch
from torch.func import grad, vmap

from trainer.losses.triplet import batch_hard_triplet


def plain(embeddings: torch.Tensor, y: torch.Tensor, margin: float | str) -> torch.Tensor:
    """Row by row, pair by pair."""
    losses = []
    for a in range(len(y)):
        distance = [torch.dist(embeddings[a], embeddings[b]) for b in range(len(y))]
        positives = [distance[b] for b in range(len(y)) if y[b] == y[a] and b != a]
        negatives = [distance[b] for b in range(len(y)) if y[b] != y[a]]
        if not positives or not negatives:
            losses.append(torch.zeros((), dtype=embeddings.dtype))
            continue
        gap = max(positives) - min(negatives)
        losses.append(torch.log1p(gap.exp()) if margin == "soft" else (margin + gap).clamp(min=0))
    return torch.stack(losses)


def test_by_hand():
    """On a line: 0 and 1 are one identity, 3 another's only row, -1 and 7 a third's."""
    embeddings = torch.tensor([[0.0], [1.0], [3.0], [-1.0], [7.0]])
    y = torch.tensor([0, 0, 1, 2, 2])
    # rows: d_p = 1, d_n = 1 | d_p = 1, d_n = 2 | no positive | d_p = 8, d_n = 1 | d_p = 8, d_n = 4
    losses = batch_hard_triplet(embeddings, y, margin=0.3)
    torch.testing.assert_close(losses, torch.tensor([0.3, 0.0, 0.0, 7.3, 4.3]))
    soft = batch_hard_triplet(embeddings, y, margin="soft")
    expected = [math.log(2.0), math.log1p(math.exp(-1.0)), 0.0, math.log1p(math.exp(7.0)), math.log1p(math.exp(4.0))]
    torch.testing.assert_close(soft, torch.tensor(expected))


@pytest.mark.parametrize("margin", [0.3, 2.0, "soft"])
def test_against_pairs_one_by_one(margin: float | str):
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        embeddings = torch.randn(11, 5, generator=generator, dtype=torch.float64)
        y = torch.randint(0, 4, (11,), generator=generator)
        torch.testing.assert_close(batch_hard_triplet(embeddings, y, margin=margin), plain(embeddings, y, margin))


def test_gradient_is_that_of_finite_differences():
    generator = torch.Generator().manual_seed(1)
    embeddings = torch.randn(8, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    y = torch.arange(8) // 2
    assert torch.autograd.gradcheck(lambda e: batch_hard_triplet(e, y, margin=5.0), embeddings)
    assert torch.autograd.gradcheck(lambda e: batch_hard_triplet(e, y, margin="soft"), embeddings)


def test_repeated_rows_of_one_picture_are_no_trouble():
    """An identity with one image fills its places with it: a distance of exactly 0, and no NaN from its root."""
    embeddings = (1000.0 + torch.randn(1, 16, generator=torch.Generator().manual_seed(0))).repeat(4, 1)
    embeddings = torch.cat([embeddings, embeddings[:2] + 0.01]).requires_grad_()
    losses = batch_hard_triplet(embeddings, torch.tensor([0, 0, 0, 0, 1, 1]), margin=0.3)
    expected = 0.3 - torch.dist(embeddings[0], embeddings[4])
    torch.testing.assert_close(losses.detach(), expected.detach().expand(6))
    (gradient,) = torch.autograd.grad(losses.sum(), embeddings)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


@pytest.mark.parametrize("y", [[0], [0, 1, 2], [3, 3, 3]], ids=["one row", "no positive", "no negative"])
def test_without_a_positive_or_a_negative_nothing_is_lost(y: list[int]):
    embeddings = torch.randn(len(y), 4, requires_grad=True)
    losses = batch_hard_triplet(embeddings, torch.tensor(y))
    assert losses.tolist() == [0.0] * len(y)
    (gradient,) = torch.autograd.grad(losses.sum(), embeddings)
    assert (gradient == 0).all()


def test_no_rows_and_half_precision():
    assert batch_hard_triplet(torch.empty(0, 3), torch.empty(0, dtype=torch.long)).shape == (0,)
    embeddings, y = torch.randn(6, 8).bfloat16(), torch.arange(6) // 2
    losses = batch_hard_triplet(embeddings, y)
    assert losses.dtype == torch.float32 and torch.equal(losses, batch_hard_triplet(embeddings.float(), y))


def test_single_rows_under_vmap():
    embeddings, y = torch.randn(5, 4), torch.arange(5)

    def loss(row: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return batch_hard_triplet(row[None], label[None]).sum()

    assert (vmap(grad(loss))(embeddings, y) == 0).all()


def test_the_order_of_rows_does_not_matter():
    embeddings, y = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 2, 2])
    whole = batch_hard_triplet(embeddings, y)
    for order in itertools.islice(itertools.permutations(range(6)), 0, 720, 97):
        torch.testing.assert_close(batch_hard_triplet(embeddings[list(order)], y[list(order)]), whole[list(order)])
