import math

import torch

from trainer.losses.cross_entropy import cross_entropy


def test_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])  # probabilities (1/4, 3/4) and (1/2, 1/2)
    y = torch.tensor([0, 1])
    torch.testing.assert_close(cross_entropy(logits, y), torch.tensor([math.log(4.0), math.log(2.0)]))
    smoothed = [0.9 * math.log(4.0) + 0.1 * math.log(4 / 3), math.log(2.0)]  # targets (0.9, 0.1), (0.1, 0.9)
    torch.testing.assert_close(cross_entropy(logits, y, label_smoothing=0.2), torch.tensor(smoothed))


def test_half_precision_logits_lose_no_more_than_their_own_rounding():
    logits = torch.tensor([[3.0, -7.0, 0.5]])  # exact in bfloat16
    y = torch.tensor([1])
    loss = cross_entropy(logits.bfloat16(), y)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, cross_entropy(logits, y), rtol=0, atol=0)
