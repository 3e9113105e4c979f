import math

import torch
import torch.nn.functional as F

from trainer.losses.cosface import cosface


def test_by_hand():
    cosines, y = torch.tensor([[0.8, 0.1], [-0.2, 0.5]]), torch.tensor([0, 0])
    losses = cosface(cosines, y, scale=2.0, margin=0.3)
    first = math.log1p(math.exp(2 * 0.1 - 2 * (0.8 - 0.3)))
    second = math.log1p(math.exp(2 * 0.5 - 2 * (-0.2 - 0.3)))
    torch.testing.assert_close(losses, torch.tensor([first, second]))


def test_without_a_margin_it_is_the_cross_entropy_of_scaled_cosines():
    cosines = torch.rand(9, 5, generator=torch.Generator().manual_seed(0)) * 2 - 1
    y = torch.arange(9) % 5
    torch.testing.assert_close(
        cosface(cosines, y, scale=64.0, margin=0.0), F.cross_entropy(64 * cosines, y, reduction="none")
    )


def test_the_margin_makes_it_harder_and_only_the_true_class_feels_it():
    """Their section 3.2: at scale s the loss with margin m at cos is the loss without at cos - m; it grows with m."""
    cosines = torch.rand(7, 4, dtype=torch.float64) * 2 - 1
    y = torch.arange(7) % 4
    losses = [cosface(cosines, y, scale=10.0, margin=m) for m in (0.0, 0.2, 0.35)]
    assert (losses[0] < losses[1]).all() and (losses[1] < losses[2]).all()
    shifted = cosines.clone()
    shifted[torch.arange(7), y] -= 0.35
    torch.testing.assert_close(cosface(shifted, y, scale=10.0, margin=0.0), losses[2])


def test_a_small_scale_cannot_reach_a_small_loss():
    """Their eq. 6: with C classes told apart as well as can be, p of the true class is bounded by the scale."""
    classes = 3
    angles = 2 * math.pi * torch.arange(classes) / classes  # the directions of the classes, as far apart as they go
    weights = torch.stack([angles.cos(), angles.sin()], 1)
    y = torch.arange(classes)
    for probability in (0.5, 0.9, 0.99):
        least = (classes - 1) / classes * math.log((classes - 1) * probability / (1 - probability))
        at_bound = cosface(weights @ weights.T, y, scale=least, margin=0.0)
        torch.testing.assert_close((-at_bound).exp(), torch.full((classes,), probability), rtol=1e-4, atol=1e-4)


def test_gradient_is_that_of_finite_differences():
    cosines = (torch.rand(4, 3, dtype=torch.float64) * 1.8 - 0.9).requires_grad_()
    assert torch.autograd.gradcheck(lambda c: cosface(c, torch.tensor([0, 1, 2, 0]), scale=4.0), cosines)


def test_half_precision_is_computed_in_float32():
    cosines = (torch.rand(4, 3) * 2 - 1).bfloat16()
    assert cosface(cosines, torch.tensor([0, 1, 2, 0])).dtype == torch.float32
