"""The LSTM against torch's own; heads that see the order of frames; a network that is its parts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from trainer.tasks.sequence_networks import ClipNetwork, Lstm, LstmHead, TransformerHead


def fused(own: Lstm, inputs: int, hidden: int, layers: int) -> nn.LSTM:
    """torch's LSTM with the same weights."""
    other = nn.LSTM(inputs, hidden, layers, batch_first=True)
    with torch.no_grad():
        for layer in range(layers):
            for name, linear in (("ih", own.of_input[layer]), ("hh", own.of_state[layer])):
                getattr(other, f"weight_{name}_l{layer}").copy_(linear.weight)
                getattr(other, f"bias_{name}_l{layer}").copy_(linear.bias)
    return other


@pytest.mark.parametrize(("inputs", "hidden", "layers", "frames"), [(3, 4, 1, 1), (6, 5, 2, 7), (2, 8, 3, 4)])
def test_the_lstm_is_torchs(inputs: int, hidden: int, layers: int, frames: int):
    torch.manual_seed(0)
    own = Lstm(inputs, hidden, layers).double()
    other = fused(own, inputs, hidden, layers).double()
    x = torch.randn(3, frames, inputs, dtype=torch.float64, requires_grad=True)
    mine, theirs = own(x), other(x)[0]
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(mine)
    (a,), (b,) = (torch.autograd.grad((states * weights).sum(), x) for states in (mine, theirs))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_lstm_begins_as_torchs_does():
    bound = 1 / 16**0.5
    for parameter in Lstm(5, 16, 2).parameters():
        assert parameter.abs().max() <= bound and parameter.abs().max() > 0.8 * bound


HEADS = {
    "lstm": lambda: LstmHead(6, 8, 2, 0.0),
    "transformer": lambda: TransformerHead(6, 8, 2, 0.0, heads=2, frames=5),
}


def network(head: str) -> ClipNetwork:
    torch.manual_seed(1)
    of_frames = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 6), nn.Tanh())
    return ClipNetwork(of_frames, HEADS[head](), 8, 3, drop_rate=0.0).eval()


@pytest.mark.parametrize("head", HEADS)
def test_each_frame_is_seen_alone_and_their_order_matters(head: str):
    model, x = network(head), torch.randn(2, 5, 3, 4, 4)
    frames = torch.stack([model.of_frames(x[:, index]) for index in range(5)], dim=1)
    torch.testing.assert_close(model(x), model.head(model.of_sequence(frames)))
    torch.testing.assert_close(
        model.forward_features(x), model.forward_head(model.forward_features(x), pre_logits=True)
    )
    assert (model(x) - model(x.flip(1))).abs().max() > 1e-3
    torch.testing.assert_close(model(x)[1:], model(x[1:]))  # rows do not influence each other


@pytest.mark.parametrize("head", HEADS)
def test_it_takes_other_weights_and_is_mapped_over_rows(head: str):
    """What VoG, lookahead and gradient norms do with a model."""
    model, x = network(head), torch.randn(3, 5, 3, 4, 4)
    own = {name: tensor.detach() for name, tensor in model.named_parameters()}
    other = {name: tensor + 0.1 for name, tensor in own.items()}
    expected = network(head)
    expected.load_state_dict(other)
    torch.testing.assert_close(functional_call(model, other, (x,)), expected(x))

    def loss(weights: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(model, weights, (row[None],)).square().sum()

    with sdpa_kernel(SDPBackend.MATH):  # vmap has no rule for the fused attention kernels
        mapped = vmap(grad(loss), in_dims=(None, 0))(own, x)
    for row in range(3):
        alone = torch.autograd.grad(model(x[row : row + 1]).square().sum(), list(model.parameters()))
        for (name, gradient), expected_one in zip(mapped.items(), alone, strict=True):
            torch.testing.assert_close(gradient[row], expected_one, rtol=1e-4, atol=1e-5, msg=name)
