import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from generator_service.rl.guard import Guard, Observation, diversity, nearest, trend
from generator_service.rl.rewards import Bank
from protocol.tuning import GuardOptions


def seen(*, kl=0.0, apart=1.0, copy=1.0, total=0.0, **components) -> Observation:
    return Observation(kl, apart, copy, components or {"semantic": 0.0}, total)


def kinds(findings) -> list[tuple[str, bool]]:
    return [(finding.kind, finding.breach) for finding in findings]


def test_nothing_wrong():
    guard = Guard(GuardOptions(copy_distance=0.5))
    for _ in range(50):
        assert guard.check(seen(kl=0.1, apart=0.9, copy=0.5, semantic=0.3, total=0.3)) == []


@pytest.mark.parametrize("kl", [0.11, math.inf, math.nan])
def test_the_ceiling(kl):
    guard = Guard(GuardOptions(kl_ceiling=0.1))
    assert guard.check(seen(kl=0.1)) == []
    (finding,) = guard.check(seen(kl=kl))
    assert (finding.kind, finding.breach) == ("kl", True)
    assert f"{kl:.3g}" in finding.message and "ceiling of 0.1" in finding.message
    assert Guard(GuardOptions(kl_ceiling=0)).check(seen(kl=kl)) == []


@pytest.mark.parametrize("apart", [0.39, 0.0, math.nan])
def test_the_floor_is_part_of_the_first_rollout_s_diversity(apart):
    guard = Guard(GuardOptions(diversity_floor=0.2))
    assert guard.check(seen(apart=2.0)) == []
    assert guard.check(seen(apart=0.4)) == []
    (finding,) = guard.check(seen(apart=apart))
    assert (finding.kind, finding.breach) == ("diversity", True) and "0.2 of the first rollout's 2" in finding.message


def test_diversity_that_cannot_be_measured_is_no_finding():
    guard = Guard(GuardOptions(diversity_floor=0.5))
    assert guard.check(seen(apart=None)) == []
    assert guard.check(seen(apart=1.0)) == []  # the first one there is
    assert guard.check(seen(apart=None)) == []
    assert kinds(guard.check(seen(apart=0.4))) == [("diversity", True)]


def test_a_floor_of_0_is_none():
    guard = Guard(GuardOptions(diversity_floor=0.0))
    guard.check(seen(apart=2.0))
    assert guard.check(seen(apart=0.0)) == []


@pytest.mark.parametrize("copy", [0.09, 0.0, math.nan])
def test_copies(copy):
    guard = Guard(GuardOptions(copy_distance=0.1))
    assert guard.check(seen(copy=0.1)) == []
    assert kinds(guard.check(seen(copy=copy))) == [("copies", True)]
    assert Guard(GuardOptions(copy_distance=0.0)).check(seen(copy=copy)) == []


def test_everything_at_once():
    guard = Guard(GuardOptions(copy_distance=0.1))
    guard.check(seen())
    found = guard.check(seen(kl=1.0, apart=0.1, copy=0.0))
    assert kinds(found) == [("kl", True), ("diversity", True), ("copies", True)]


def rollouts(count: int, falling: float, rising: float, noise: float, seed: int = 0):
    rng = np.random.default_rng(seed)
    for at in range(count):
        coverage = -falling * at + noise * rng.standard_normal()
        semantic = (rising + falling) * at + noise * rng.standard_normal()
        yield seen(semantic=semantic, coverage=coverage, total=semantic + coverage)


def test_a_component_that_falls_while_the_total_rises():
    """Told once a window, and no breach."""
    guard = Guard(GuardOptions(trend=10))
    found = [guard.check(each) for each in rollouts(25, falling=0.02, rising=0.05, noise=0.02)]
    assert [at for at, findings in enumerate(found) if findings] == [9, 19]
    (finding,) = found[9]
    assert (finding.kind, finding.breach) == ("trend", False) and finding.message.startswith("coverage falls by 0.0")


def test_a_perfect_line_is_a_trend():
    guard = Guard(GuardOptions(trend=4))
    found = [guard.check(each) for each in rollouts(4, falling=0.1, rising=0.1, noise=0.0)]
    assert [kinds(each) for each in found] == [[], [], [], [("trend", False)]]


@pytest.mark.parametrize(
    ("falling", "rising"),
    [(0.02, -0.05), (-0.02, 0.05), (0.02, 0.0)],
    ids=["the total falls too", "both rise", "the total stays"],
)
def test_no_such_trend(falling, rising):
    guard = Guard(GuardOptions(trend=10))
    assert not any(guard.check(each) for each in rollouts(40, falling, rising, noise=0.02))


def test_noise_is_seldom_taken_for_a_trend():
    """Of 2000 windows of pure noise that follow each other, where both have to be significant the same way."""
    guard = Guard(GuardOptions(trend=10))
    found = [guard.check(each) for each in rollouts(2000, 0.0, 0.0, noise=1.0)]
    assert sum(map(len, found)) < 10


def test_values_that_stay_are_no_trend():
    guard = Guard(GuardOptions(trend=7))
    assert not any(guard.check(seen(semantic=0.1, coverage=1 / 3, total=0.1 + 1 / 3)) for _ in range(30))


def test_only_the_last_rollouts_count():
    """A fall that is over has left the window when the total begins to rise."""
    guard = Guard(GuardOptions(trend=10))
    fell = [guard.check(seen(coverage=coverage, total=0.0)) for coverage in [5.0] * 9 + [0.0] * 10]
    assert not any(fell + [guard.check(seen(coverage=0.0, total=float(at))) for at in range(10)])
    assert len(guard.state()["history"]) == 10


def test_the_slope_is_that_of_least_squares():
    values = np.random.default_rng(0).standard_normal(15).tolist()
    (slope, _), covariance = np.polyfit(np.arange(15), values, 1, cov=True)
    found, error = trend(values)
    assert found == pytest.approx(slope, rel=1e-9) and error == pytest.approx(math.sqrt(covariance[0, 0]), rel=1e-9)
    assert trend([1.0, 3.0, 5.0, 7.0]) == (2.0, 0.0)


def test_restored_it_goes_on_as_before():
    """Its state as JSON, in the middle of a window."""
    options = GuardOptions(trend=10, diversity_floor=0.5)
    history = list(rollouts(25, falling=0.02, rising=0.05, noise=0.02))
    whole, first, resumed = Guard(options), Guard(options), Guard(options)
    for each in history[:7]:
        first.check(each)
    resumed.restore(json.loads(json.dumps(first.state())))
    expected = [whole.check(each) for each in history]
    assert [resumed.check(each) for each in history[7:]] == expected[7:] and any(expected[7:])


def test_the_first_rollout_s_diversity_is_restored():
    first, resumed = Guard(GuardOptions(diversity_floor=0.5)), Guard(GuardOptions(diversity_floor=0.5))
    first.check(seen(apart=2.0))
    resumed.restore(json.loads(json.dumps(first.state())))
    assert kinds(resumed.check(seen(apart=0.9))) == [("diversity", True)]


def test_a_state_does_not_change_with_what_is_seen_after():
    guard = Guard(GuardOptions())
    guard.check(seen())
    state = json.dumps(guard.state())
    kept = guard.state()
    guard.check(seen(semantic=3.0))
    assert json.dumps(kept) == state


# ---------------------------------------------------------------- what is observed


def features(rows: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, 12, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_diversity_is_that_of_plain_loops():
    made, labels = features(40, 0), torch.arange(40) % 7 // 2
    pairs = [float((made[i] - made[j]).norm()) for i in range(40) for j in range(i) if int(labels[i]) == int(labels[j])]
    assert diversity(made, labels) == pytest.approx(np.mean(pairs), rel=1e-5)


def test_diversity_by_hand():
    made = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [1.0, 0.0]])
    assert diversity(made, torch.tensor([0, 0, 0, 1])) == pytest.approx((2 * math.sqrt(2) + 2) / 3)
    assert diversity(made, torch.tensor([0, 1, 1, 0])) == pytest.approx(math.sqrt(2) / 2)
    assert diversity(made, torch.tensor([0, 1, 2, 3])) is None


def test_the_nearest_of_the_bank():
    """Whatever the class; more rows than are compared at a time; a copy is at 0 exactly."""
    made, bank = features(600, 0), Bank(features(50, 1), torch.arange(50) % 3)
    made[17] = bank.features[31]
    found = nearest(made, bank)
    wanted = torch.stack([(feature - bank.features).norm(dim=1).min() for feature in made])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert found[17] == 0.0
