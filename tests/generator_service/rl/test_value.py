import pytest
import torch
from safetensors.torch import load_file, save_file

from generator_service.rl.value import open_baseline

KINDS = ["none", "group", "value"]
SHAPE = (2, 5, 3)


def batch(rows: int = 32, seed: int = 0):
    """Latents, times, labels of three classes, and a reward that depends on all of them."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(rows, *SHAPE, generator=generator)
    times, labels = torch.rand(rows, generator=generator), torch.randint(3, (rows,), generator=generator)
    rewards = torch.tanh(latents[:, 0].mean((1, 2)) * 3) * (1 - times) + 0.5 * (labels - 1)
    return latents, times, labels, rewards


@pytest.mark.parametrize("kind", KINDS)
def test_before_the_first_fit_nothing_is_expected(kind):
    latents, times, labels, _ = batch()
    values = open_baseline(kind, 3, SHAPE, seed=0).values(latents, times, labels)
    assert torch.equal(values, torch.zeros(32)) and values.dtype == torch.float32


def test_none_stays_so():
    baseline, (latents, times, labels, rewards) = open_baseline("none", 3, SHAPE, seed=0), batch()
    assert baseline.fit(latents, times, labels, rewards) == 0.0
    assert not baseline.values(latents, times, labels).any()


def test_running_means_by_hand():
    """The first mean counts whole, then a tenth of the way at a time; a class that is not there stays."""
    baseline = open_baseline("group", 3, SHAPE, seed=0)
    latents, times = torch.zeros(3, *SHAPE), torch.zeros(3)

    def fit(labels, rewards) -> float:
        return baseline.fit(latents, times, torch.tensor(labels), torch.tensor(rewards))

    assert fit([0, 0, 2], [1.0, 3.0, -1.0]) == pytest.approx((1 + 9 + 1) / 3)
    assert baseline.values(latents, times, torch.tensor([0, 1, 2])).tolist() == [2.0, 0.0, -1.0]
    assert fit([0, 0, 1], [4.0, 4.0, 5.0]) == pytest.approx((4 + 4 + 25) / 3)
    wanted = torch.tensor([5.0, -1.0, 2.0 + 0.1 * 2])
    torch.testing.assert_close(baseline.values(latents, times, torch.tensor([1, 2, 0])), wanted)


def test_the_net_learns_what_latents_time_and_class_tell():
    """On data that it has not seen it leaves a small part of what the mean alone leaves."""
    baseline = open_baseline("value", 3, SHAPE, seed=0)
    losses = [baseline.fit(*batch(128, seed)) for seed in range(600)]
    *unseen, rewards = batch(512, 10_000)
    left = (baseline.values(*unseen) - rewards).square().mean() / rewards.var()
    assert left < 0.1 and losses[-1] < 0.2 * losses[0]


def test_the_net_tells_each_of_its_inputs_apart():
    baseline, (latents, times, labels, rewards) = open_baseline("value", 3, SHAPE, seed=0), batch()
    for _ in range(3):
        baseline.fit(latents, times, labels, rewards)
    values = baseline.values(latents, times, labels)
    for other in [(-latents, times, labels), (latents, 1 - times, labels), (latents, times, (labels + 1) % 3)]:
        assert (baseline.values(*other) - values).abs().min() > 0


def test_the_loss_is_the_mean_squared_error_from_before():
    baseline, (latents, times, labels, rewards) = open_baseline("value", 3, SHAPE, seed=0), batch()
    baseline.fit(latents, times, labels, rewards)
    wanted = (baseline.values(latents, times, labels) - rewards).square().mean().item()
    assert baseline.fit(latents, times, labels, rewards) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_values_have_no_gradients_and_fitting_needs_none_outside(kind):
    baseline, (latents, times, labels, rewards) = open_baseline(kind, 3, SHAPE, seed=0), batch()
    with torch.no_grad():
        baseline.fit(latents, times, labels, rewards)
    latents.requires_grad_()
    rewards.requires_grad_()
    baseline.fit(latents, times, labels, rewards)
    assert not baseline.values(latents, times, labels).requires_grad
    assert latents.grad is None and rewards.grad is None


def test_the_seed_decides_and_the_global_random_state_stays():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    found = [open_baseline("value", 3, SHAPE, seed=seed) for seed in (1, 1, 2)]
    for baseline in found:
        baseline.fit(*batch())
    assert torch.equal(torch.get_rng_state(), before)
    one, same, other = (baseline.state() for baseline in found)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["net.of_class.weight"], other["net.of_class.weight"])


@pytest.mark.parametrize("fits", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_from_a_file_it_goes_on_to_the_bit(kind, fits, tmp_path):
    whole = open_baseline(kind, 3, SHAPE, seed=0)
    for seed in range(fits):
        whole.fit(*batch(seed=seed))
    save_file(whole.state(), tmp_path / "baseline.safetensors")
    resumed = open_baseline(kind, 3, SHAPE, seed=99)
    for seed in range(7):
        resumed.fit(*batch(seed=seed))  # to be forgotten
    resumed.restore(load_file(tmp_path / "baseline.safetensors"))
    for seed in range(10, 14):
        assert resumed.fit(*batch(seed=seed)) == whole.fit(*batch(seed=seed))
    latents, times, labels, _ = batch(seed=20)
    assert torch.equal(resumed.values(latents, times, labels), whole.values(latents, times, labels))


@pytest.mark.parametrize("kind", ["group", "value"])
def test_a_state_does_not_change_with_what_is_learnt_after(kind):
    baseline = open_baseline(kind, 3, SHAPE, seed=0)
    baseline.fit(*batch())
    state = baseline.state()
    copies = {name: value.clone() for name, value in state.items()}
    baseline.fit(*batch(seed=1))
    assert all(torch.equal(state[name], copies[name]) for name in state)
    baseline.restore(state)
    baseline.fit(*batch(seed=1))
    assert all(torch.equal(state[name], copies[name]) for name in state)


@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 2, 2), (3, 17, 9)])
def test_latents_of_any_size(shape):
    baseline = open_baseline("value", 1, shape, seed=0)
    latents, times, labels = torch.randn(2, *shape), torch.rand(2), torch.zeros(2, dtype=torch.int64)
    baseline.fit(latents, times, labels, torch.ones(2))
    assert baseline.values(latents, times, labels).isfinite().all()
