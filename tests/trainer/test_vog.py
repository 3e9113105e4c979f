import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trainer.selection.ranking import keep
from trainer.selection.vog import vog, vog_from_gradients

REFERENCE = Path(__file__).parents[2].parent / "shared/data/vog_reference.npz"


class Linear(nn.Module):
    """Logits are linear in the pixels, so the gradient of logit y is row y of the weights."""

    def __init__(self, classes: int, pixels: int):
        super().__init__()
        self.layer = nn.Linear(pixels, classes, bias=False)

    def forward(self, x):
        return self.layer(x.flatten(1))


def smooth_network() -> nn.Module:
    """Convolution, normalisation, dropout: differentiable everywhere, in float64 for finite differences."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 3)
    ).double()


def snapshots_of(make, count: int) -> list[dict[str, torch.Tensor]]:
    """Snapshots with weights and normalisation statistics of their own."""
    snapshots = []
    for seed in range(count):
        torch.manual_seed(seed)
        model = make()
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5) if name.endswith("var") else buffer.normal_()
        snapshots.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    return snapshots


def test_a_linear_model_by_hand():
    """One row of two pixels; the gradient of logit 1 is the second row of weights, colours first."""
    ones = torch.ones(1, 6)
    weights = [
        torch.tensor([[3.0, 0.0, 0.0, 0.0, 0.0, 6.0]]),  # channel means: pixel 0: (3+0+0)/3 = 1, pixel 1: (0+0+6)/3 = 2
        torch.tensor([[9.0, 1.0, 0.0, 1.0, 0.0, 4.0]]),  # 3, 2
        torch.tensor([[5.0, 8.0, 5.0, 0.0, 5.0, 7.0]]),  # 5, 5
    ]
    snapshots = [{"layer.weight": torch.cat([ones, w])} for w in weights]
    x, y = torch.randn(1, 3, 1, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([1])
    std = [math.sqrt(8 / 3), math.sqrt(2.0)]  # of (1, 3, 5) and of (2, 2, 5), population
    score = vog(Linear(2, 6), snapshots, x, y)
    assert score.item() == pytest.approx(sum(std) / 2, rel=1e-6)
    variance = vog(Linear(2, 6), snapshots, x, y, spread="variance")
    assert variance.item() == pytest.approx((8 / 3 + 2) / 2, rel=1e-6)
    assert vog(Linear(2, 6), snapshots, x, torch.tensor([0])).item() == 0.0


def test_finite_differences():
    model, snapshots = smooth_network(), snapshots_of(smooth_network, 3)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=generator)
    y = torch.tensor([2, 0])
    expected = []
    for row, label in zip(x, y, strict=True):
        gradients = []
        for snapshot in snapshots:
            probe = smooth_network()
            probe.load_state_dict(snapshot)
            probe.eval()
            steps = 1e-5 * torch.eye(row.numel(), dtype=torch.float64).reshape(-1, *row.shape)
            with torch.no_grad():
                slope = (probe(row + steps) - probe(row - steps))[:, label] / 2e-5
            gradients.append(slope.reshape(row.shape).mean(0))
        expected.append(torch.stack(gradients).std(0, correction=0).mean())
    torch.testing.assert_close(vog(model, snapshots, x, y), torch.stack(expected), rtol=1e-6, atol=0)


def test_the_batch_size_and_the_models_own_state_do_not_matter_and_nothing_changes():
    model, snapshots = smooth_network(), snapshots_of(smooth_network, 4)
    copies = [{name: tensor.clone() for name, tensor in snapshot.items()} for snapshot in snapshots]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model[1].eval()
    x, y = torch.randn(7, 3, 4, 4, dtype=torch.float64), torch.arange(7) % 3
    rng = torch.get_rng_state()
    with torch.no_grad():
        whole = vog(model, snapshots, x, y)
    torch.testing.assert_close(vog(smooth_network(), snapshots, x, y, batch_size=3), whole, rtol=1e-10, atol=0)
    assert model.training and not model[1].training and model[3].training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters()) and not x.requires_grad
    for snapshot, copy in zip(snapshots, copies, strict=True):
        assert all(torch.equal(snapshot[name], copy[name]) for name in copy)
    model.load_state_dict(snapshots[0])
    with torch.random.fork_rng():
        torch.set_rng_state(rng)
        vog(model, snapshots, x, y)
        assert torch.equal(rng, torch.get_rng_state())


def test_another_logit():
    snapshots = [{"layer.weight": torch.eye(2, 6) * scale} for scale in (1.0, 2.0, 4.0)]
    x, y = torch.randn(3, 3, 1, 2), torch.tensor([0, 1, 0])
    plain = vog(Linear(2, 6), snapshots, x, y)
    doubled = vog(Linear(2, 6), snapshots, x, y, logit=lambda outputs, y: 2 * outputs[torch.arange(3), y])
    torch.testing.assert_close(doubled, 2 * plain)


def test_no_rows_give_no_scores():
    snapshots = snapshots_of(smooth_network, 2)
    empty = vog(smooth_network(), snapshots, torch.zeros(0, 3, 4, 4).double(), torch.zeros(0, dtype=torch.long))
    assert empty.shape == (0,)


def test_an_incomplete_snapshot_is_refused():
    snapshot = snapshots_of(smooth_network, 1)[0]
    del snapshot["1.running_mean"]
    with pytest.raises(AssertionError, match=r"lacks \['1.running_mean'\]"):
        vog(smooth_network(), [snapshot] * 2, torch.zeros(1, 3, 4, 4).double(), torch.zeros(1, dtype=torch.long))


@pytest.mark.parametrize("spread", ["std", "variance"])
def test_running_moments_equal_two_passes(spread):
    gradients = torch.randn(5, 12, 8, 8, dtype=torch.float64) + 100.0  # a large mean: the naive formula loses digits
    two_pass = gradients.var(1, correction=0) if spread == "variance" else gradients.std(1, correction=0)
    torch.testing.assert_close(vog_from_gradients(gradients, spread=spread), two_pass.mean((1, 2)), rtol=1e-10, atol=0)


def test_the_authors_reference_scores():
    if not REFERENCE.exists():
        pytest.skip(f"{REFERENCE} is not here")
    with np.load(REFERENCE) as data:
        gradients, published = torch.from_numpy(data["gradients"]), torch.from_numpy(data["vog"])
    before = gradients.clone()
    error = ((vog_from_gradients(gradients) - published).abs() / published).max().item()
    print(f"largest relative error against the authors' scores: {error:.1e}")
    assert error < 1e-6
    assert torch.equal(gradients, before)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=60),
    st.integers(0, 100).map(lambda percent: Fraction(percent, 100)),
)
def test_keep_drops_exactly_the_lowest_of_each_class(rows, fraction):
    labels = torch.tensor([label for label, _ in rows], dtype=torch.long)
    scores = torch.tensor([score for _, score in rows], dtype=torch.float32)
    kept = keep(scores, labels, float(fraction))
    for label in labels.unique():
        member = labels == label
        dropped = member & ~kept
        assert dropped.sum() == math.floor(fraction * int(member.sum()))
        if dropped.any() and (member & kept).any():
            worst_kept = min((scores[i].item(), i) for i in (member & kept).nonzero()[:, 0].tolist())
            best_dropped = max((scores[i].item(), i) for i in dropped.nonzero()[:, 0].tolist())
            assert best_dropped < worst_kept


def test_keep_by_hand():
    labels = torch.tensor([1, 0, 1, 1, 0, 1, 7])
    scores = torch.tensor([3.0, 5.0, 1.0, 2.0, 4.0, 2.0, 0.0])
    assert keep(scores, labels, 0.5).tolist() == [True, True, False, False, False, True, True]
    hundred = keep(torch.arange(100.0), torch.zeros(100, dtype=torch.long), 0.29)  # 0.29 * 100 is 28.999... in floats
    assert (~hundred).sum() == 29


# ---------------------------------------------------------------- clips


class Recurrent(nn.Module):
    """[B, 2] of clips [B, M, 3, H, W]: a state that each frame changes, not linearly."""

    def __init__(self) -> None:
        super().__init__()
        self.of_frame, self.of_state = nn.Linear(3 * 2 * 2, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        state = x.new_zeros(len(x), 4)
        for frame in x.unbind(1):
            state = torch.tanh(self.of_frame(frame.flatten(1)) + self.of_state(state))
        return self.head(state)


def test_of_clips_it_is_the_spread_at_each_pixel_of_each_frame():
    """Central differences of the true-class logit: colour mean, spread over checkpoints, mean over the rest."""
    torch.manual_seed(0)
    model = Recurrent().double()
    snapshots = [{name: torch.randn_like(value) for name, value in model.state_dict().items()} for _ in range(3)]
    x, y = torch.randn(2, 3, 3, 2, 2, dtype=torch.float64), torch.tensor([1, 0])
    gradients = torch.zeros(3, *x.shape, dtype=torch.float64)
    for checkpoint, snapshot in enumerate(snapshots):
        model.load_state_dict(snapshot)
        for at in np.ndindex(*x.shape):
            ends = []
            for step in (1e-5, -1e-5):
                moved = x.clone()
                moved[at] += step
                with torch.no_grad():
                    ends.append(model(moved)[at[0], y[at[0]]])
            gradients[checkpoint][at] = (ends[0] - ends[1]) / 2e-5
    expected = gradients.mean(3).std(0, unbiased=False).mean((1, 2, 3))  # [C, N, M, 3, H, W]: over colours, checkpoints
    torch.testing.assert_close(vog(model, snapshots, x, y), expected, rtol=1e-6, atol=1e-9)
    by_hand = vog_from_gradients(gradients.mean(3).movedim(0, 1))
    torch.testing.assert_close(by_hand, expected, rtol=1e-12, atol=0)
