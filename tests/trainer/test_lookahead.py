import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trainer import registry
from trainer.selection.lookahead import lookahead, lookahead_scores


def row_cross_entropy(outputs, y):
    return F.cross_entropy(outputs, y, reduction="none")


def half_square(outputs, y):
    return 0.5 * (outputs.squeeze(1) - y) ** 2


def network() -> nn.Module:
    """Batch normalisation and dropout: rows depend on each other and on the random state."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(128, 5)
    )


def batch(rows: int = 12):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 3, 4, 4, generator=generator)
    return x, torch.randint(5, (rows,), generator=generator), torch.arange(rows) % 2 == 1


def by_copy_and_step(model, x, y, lr):
    """Eq. 12 spelled out: a copy of the model, a real SGD step, the same random state twice."""
    model = copy.deepcopy(model)
    state = torch.get_rng_state()
    before = row_cross_entropy(model(x), y)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr)
    optimizer.zero_grad()
    before.mean().backward()
    optimizer.step()
    torch.set_rng_state(state)
    with torch.no_grad():
        return row_cross_entropy(model(x), y) - before.detach()


def test_one_weight_by_hand():
    """w = 1 and rows (x, y) = (1, 0), (2, 2), (1, 3): residuals 1, 0, -2; the mean gradient is (1 + 0 - 2) / 3."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    x, y = torch.tensor([[1.0], [2.0], [1.0]]), torch.tensor([0.0, 2.0, 3.0])
    scores = lookahead_scores(model, half_square, x, y, virtual_lr=0.3)  # w' = 1 + 0.3 / 3 = 1.1
    by_hand = [(1.1**2 - 1) / 2, (0.2**2 - 0) / 2, (1.9**2 - 4) / 2]
    torch.testing.assert_close(scores, torch.tensor(by_hand), rtol=1e-5, atol=0)
    mask = lookahead(model, half_square, x, y, torch.tensor([True, True, False]), virtual_lr=0.3)
    assert mask.tolist() == [False, True, True]


def test_a_linear_model_in_closed_form():
    """Δl_i = ((w'.x_i - y_i)^2 - (w.x_i - y_i)^2) / 2 with w' = w - lr * mean_i((w.x_i - y_i) x_i)."""
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(9, 4, generator=generator).double(), torch.randn(9, generator=generator).double()
    model = nn.Linear(4, 1, bias=False).double()
    w = model.weight.detach()[0]
    residual = x @ w - y
    stepped = w - 0.2 * (residual[:, None] * x).mean(0)
    expected = ((x @ stepped - y) ** 2 - residual**2) / 2
    scores = lookahead_scores(model, half_square, x, y, virtual_lr=0.2)
    torch.testing.assert_close(scores, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("frozen", [False, True])
def test_equals_a_copied_model_and_a_real_step(frozen):
    model, (x, y, synthetic) = network(), batch()
    model[0].requires_grad_(not frozen)
    torch.manual_seed(7)
    scores = lookahead_scores(model, row_cross_entropy, x, y, virtual_lr=0.5)
    torch.manual_seed(7)
    expected = by_copy_and_step(model, x, y, 0.5)
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=1e-7)
    torch.manual_seed(7)
    selected = lookahead(model, row_cross_entropy, x, y, synthetic, virtual_lr=0.5)
    best = sorted(synthetic.nonzero()[:, 0].tolist(), key=lambda i: expected[i].item())[:3]
    assert selected.nonzero()[:, 0].tolist() == sorted([*range(0, 12, 2), *best])


def test_the_same_dropout_before_and_after():
    """With a vanishing step nothing but the dropout could differ."""
    model, (x, y, _) = network(), batch()
    assert lookahead_scores(model, row_cross_entropy, x, y, virtual_lr=1e-12).abs().max() < 1e-6


def test_the_real_model_optimizer_and_random_state_are_untouched():
    model, (x, y, synthetic) = network(), batch()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    row_cross_entropy(model(x), y).mean().backward()
    optimizer.step()
    model[5].bias.grad = None
    tensors = [*model.state_dict().values()]
    addresses = [tensor.data_ptr() for tensor in tensors]
    before = [tensor.clone() for tensor in tensors]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    momentum = copy.deepcopy(optimizer.state_dict())
    rng = torch.get_rng_state()
    with torch.no_grad():
        selected = lookahead(model, row_cross_entropy, x, y, synthetic, virtual_lr=0.5)
    assert selected.sum() == 9
    assert torch.equal(rng, torch.get_rng_state())
    now = [*model.state_dict().values()]
    assert [tensor.data_ptr() for tensor in now] == addresses
    assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
    for grad, parameter in zip(grads, model.parameters(), strict=True):
        assert (parameter.grad is None) if grad is None else torch.equal(grad, parameter.grad)
    for a, b in zip(momentum["state"].values(), optimizer.state_dict()["state"].values(), strict=True):
        assert torch.equal(a["momentum_buffer"], b["momentum_buffer"])


def test_the_update_after_the_virtual_step_is_the_update_without_it():
    x, y, synthetic = batch()
    with_lookahead, without = network(), network()
    for model in (with_lookahead, without):
        torch.manual_seed(9)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        if model is with_lookahead:
            lookahead(model, row_cross_entropy, x, y, synthetic, virtual_lr=0.5)
        row_cross_entropy(model(x), y).mean().backward()
        optimizer.step()
    for a, b in zip(with_lookahead.state_dict().values(), without.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_tied_weights_step_together():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 3, bias=False)
            self.second = nn.Linear(3, 3, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x))

    torch.manual_seed(0)
    model, x, y = Tied(), torch.randn(6, 3), torch.arange(6) % 3
    scores = lookahead_scores(model, row_cross_entropy, x, y, virtual_lr=0.5)
    torch.testing.assert_close(scores, by_copy_and_step(model, x, y, 0.5), rtol=1e-6, atol=1e-7)


def test_parameters_outside_the_graph_do_not_step():
    model = nn.ModuleDict({"used": nn.Linear(4, 1, bias=False), "unused": nn.Linear(4, 1)})
    model.forward = lambda x: model["used"](x)
    x, y = torch.randn(5, 4), torch.randn(5)
    scores = lookahead_scores(model, half_square, x, y, virtual_lr=0.1)
    torch.testing.assert_close(scores, lookahead_scores(model["used"], half_square, x, y, virtual_lr=0.1))


@pytest.mark.parametrize("synthetic, keep", [(torch.zeros(4, dtype=torch.bool), 0.5), (torch.ones(4).bool(), 1.0)])
def test_nothing_to_drop_costs_nothing(synthetic, keep):
    model = nn.Linear(2, 2)
    model.register_forward_hook(lambda *_: pytest.fail("a forward that nobody needs"))
    x, y = torch.randn(4, 2), torch.zeros(4, dtype=torch.long)
    assert lookahead(model, row_cross_entropy, x, y, synthetic, virtual_lr=0.1, keep=keep).all()


def test_autocast_covers_forward_and_loss():
    seen = []

    def losses(outputs, y):
        seen.append((outputs.dtype, torch.is_autocast_enabled("cpu")))
        return row_cross_entropy(outputs.float(), y)

    model, (x, y, _) = network(), batch()
    scores = lookahead_scores(
        model, losses, x, y, virtual_lr=0.5, context=lambda: torch.autocast("cpu", dtype=torch.bfloat16)
    )
    assert seen == [(torch.bfloat16, True)] * 2
    exact = lookahead_scores(model, row_cross_entropy, x, y, virtual_lr=0.5)
    assert torch.corrcoef(torch.stack([scores, exact]))[0, 1] > 0.99


def test_a_row_whose_loss_blows_up_is_dropped_first():
    model = nn.Linear(1, 1, bias=False)
    x, y = torch.tensor([[1.0], [1.0]]), torch.zeros(2)
    rows = iter([torch.tensor([1.0, 1.0]), torch.tensor([float("nan"), 5.0])])

    def losses(outputs, y):
        return next(rows) + 0 * outputs.squeeze(1)

    assert lookahead(model, losses, x, y, torch.ones(2).bool(), virtual_lr=0.1).tolist() == [False, True]


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(0, 10))
def test_the_count_is_exact_and_the_smallest_are_kept(synthetic, tenths):
    model = nn.Linear(1, 1, bias=False)
    mask, n = torch.tensor(synthetic), sum(synthetic)
    x, y = torch.linspace(-1, 2, len(mask))[:, None], torch.linspace(3, -1, len(mask))
    selected = lookahead(model, half_square, x, y, mask, virtual_lr=0.1, keep=tenths / 10)
    assert selected[~mask].all()
    assert selected[mask].sum() == math.ceil(n * tenths / 10 - 1e-9) == -(-n * tenths // 10)
    scores = lookahead_scores(model, half_square, x, y, virtual_lr=0.1)
    kept, dropped = scores[mask & selected], scores[mask & ~selected]
    assert not len(kept) or not len(dropped) or kept.max() <= dropped.min()


@pytest.mark.parametrize("head", ["lstm", "transformer"])
def test_of_clips_the_choice_is_that_of_a_copied_model(head: str):
    """The masks are equal to the bit, with dropout and batch statistics, at several step sizes."""
    kind = registry.resolve("task", "video")
    options = {"model": "small_cnn", "image_size": 8, "frames": 3, "hidden": 8, "heads": 2, "dropout": 0.2}
    task = kind(kind.Config(head=head, drop_rate=0.3, **options), tuple("abcde"))
    torch.manual_seed(0)
    model = task.build_model().train()
    generator = torch.Generator().manual_seed(1)
    x = task.preprocess(torch.randint(0, 256, (10, 3, 8, 8, 3), dtype=torch.uint8, generator=generator))
    y, synthetic = torch.randint(5, (10,), generator=generator), torch.arange(10) >= 4
    for seed, lr in enumerate((0.01, 0.3, 2.0)):
        torch.manual_seed(seed)
        selected = lookahead(model, task.losses, x, y, synthetic, virtual_lr=lr)
        torch.manual_seed(seed)
        expected = by_copy_and_step(model, x, y, lr)
        best = sorted(range(4, 10), key=lambda row: expected[row].item())[:3]
        assert selected.nonzero()[:, 0].tolist() == sorted([*range(4), *best])
