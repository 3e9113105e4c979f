import json
import math

import pytest
import torch
from pydantic import ValidationError

from trainer.run import multistep
from trainer.selection.thresholds import Bandit, FixedThresholds, LearntThresholds
from trainer.settings import OptimizerConfig, ThresholdsConfig, TrainerConfig


def learnt(**settings: int) -> LearntThresholds:
    return LearntThresholds([0.2, 0.5], [0.0, 0.25, 0.75], 0.1, **({"first": 2, "staleness": 0} | settings))


def test_the_bound_of_ucb1_by_hand():
    bandit = Bandit([1.0, 2.0], exploration=0.1)
    assert [bandit.pull(), bandit.pull()] == [0, 1]  # each once, in order
    bandit.gains = [0.02, 0.05]
    # 0.02 + 0.1 sqrt(2 ln 2) against 0.05 + 0.1 sqrt(2 ln 2)
    assert bandit.pull() == 1
    # t = 3: 0.02 + 0.1 sqrt(2 ln 3 / 1) = 0.168; 0.05 / 2 + 0.1 sqrt(2 ln 3 / 2) = 0.130
    assert bandit.pull() == 0
    # t = 4, two pulls each: the better mean
    assert bandit.pull() == 1
    assert bandit.pulls == [2, 3]


def test_without_exploration_the_best_mean_is_taken():
    bandit = Bandit([1.0, 2.0, 3.0], exploration=0.0)
    for gain in (0.1, 0.3, -0.2):
        bandit.gains[bandit.pull()] += gain
    assert [bandit.pull() for _ in range(2)] == [1, 1]  # 0.3, then 0.15
    assert bandit.pull() == 0  # a pull of no gain yet: 0.3 / 3 is not above 0.1; of equal ones the first


def test_a_good_arm_is_found_among_noisy_ones():
    """Gains around 0.01, 0.02 and 0.06 with a standard deviation of 0.02: over 200 pulls, most go to the best."""
    draw, bandit, truth = torch.Generator().manual_seed(0), Bandit([0.0, 1.0, 2.0], 0.05), (0.01, 0.06, 0.02)
    for _ in range(200):
        arm = bandit.pull()
        bandit.gains[arm] += truth[arm] + 0.02 * torch.randn((), generator=draw).item()
    assert bandit.pulls[1] > 100 and min(bandit.pulls) > 5


def test_a_gain_is_credited_to_what_the_iteration_used():
    thresholds = learnt()
    values = [0.50, 0.60, 0.58, 0.68, 0.69]
    told = []
    for iteration, value in enumerate(values):
        asked = thresholds.ask(iteration)
        dropped = thresholds.drop(iteration) if iteration >= 2 else None
        told.append(thresholds.credit(iteration, value))
        assert told[-1].get("dropped_part") == dropped
        assert told[-1].get("asked_part") == (asked if iteration >= 2 else None)
    assert [row["held_out_value"] for row in told] == values
    assert [row["held_out_gain"] for row in told] == pytest.approx([0.0, 0.1, -0.02, 0.1, 0.01])
    assert [row.get("asked_part") for row in told] == [None, None, 0.2, 0.5, 0.5]  # -0.02 against 0.1
    assert [row.get("dropped_part") for row in told] == [None, None, 0.0, 0.25, 0.75]
    (_, asked_gains), (_, dropped_gains) = thresholds.state_dict()["bandits"]
    assert asked_gains == pytest.approx([-0.02, 0.11]) and dropped_gains == pytest.approx([-0.02, 0.1, 0.01])


def test_late_samples_are_credited_to_the_feedback_they_answer():
    """K = 1: feedback starts an iteration before stage 2, and iteration i trains on answers to feedback i - 1."""
    thresholds = learnt(staleness=1)
    asked = []
    for iteration in range(5):
        asked.append(thresholds.ask(iteration))
        if iteration >= 2:
            thresholds.drop(iteration)
        told = thresholds.credit(iteration, float(iteration))
        assert told.get("asked_part") == (asked[iteration - 1] if iteration >= 2 else None)
    assert asked[:3] == [0.2, 0.2, 0.5]  # nothing is tried before feedback 1


def test_a_resumed_choice_is_the_uninterrupted_one():
    """Saved as a checkpoint does, and asked twice as a resumed iteration does."""
    whole, halves = learnt(staleness=1), learnt(staleness=1)
    gains = [math.sin(3.0 * i) for i in range(12)]
    for iteration, value in enumerate(gains):
        expected = (whole.ask(iteration), whole.drop(iteration), whole.credit(iteration, value))
        assert halves.ask(iteration) == expected[0]
        state = halves.state_dict()
        halves = learnt(staleness=1)
        halves.load_state_dict(state)
        assert (halves.ask(iteration), halves.drop(iteration), halves.credit(iteration, value)) == expected
    json.dumps(whole.state_dict())  # plain values


def test_fixed_ones_stay():
    fixed = FixedThresholds(0.2, 0.25)
    fixed.load_state_dict(fixed.state_dict())
    assert [(fixed.ask(i), fixed.drop(i)) for i in range(3)] == [(0.2, 0.25)] * 3


def test_their_table_of_the_settings():
    assert not ThresholdsConfig().auto
    for wrong in ({"asked": []}, {"dropped": [1.0]}, {"asked": [0.0]}, {"exploration": -1.0}, {"held_out": 1.0}):
        with pytest.raises(ValidationError):
            ThresholdsConfig.model_validate(wrong)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"similarity": {"enabled": True}}, "similarity takes the place of vog"),
        ({"mode": "async", "pool_from": "runs/a"}, "mode async has no pool"),
        ({"mode": "synthetic", "vog": {"enabled": False}, "warmup_iterations": 0}, "mode synthetic trains on its pool"),
        ({"mode": "synthetic", "thresholds": {"auto": True}}, "mode synthetic has no thresholds to learn"),
        ({"mode": "real", "thresholds": {"auto": True}}, "mode real has no thresholds to learn"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict, message: str):
    with pytest.raises(ValidationError, match=message):
        TrainerConfig.model_validate({"dataset": {"root": "x"}} | settings)


def test_the_filter_and_what_it_drops():
    def config(**settings: dict) -> TrainerConfig:
        return TrainerConfig.model_validate({"dataset": {"root": "x"}} | settings)

    off = {"enabled": False, "fraction": 0.75}
    assert (config().filter, config().dropped) == ("vog", 0.25)
    arm = config(vog=off, similarity={"enabled": True, "fraction": 0.5})
    assert (arm.filter, arm.dropped) == ("similarity", 0.5)
    assert (config(vog=off).filter, config(vog=off).dropped) == (None, 0.0)


def test_the_learning_rate_of_table_12():
    """0.1, x 0.2 at epochs 50, 100 and 150 of 200."""
    plain = OptimizerConfig()
    rates = [multistep(plain, epoch) for epoch in range(200)]
    assert rates == pytest.approx([0.1] * 50 + [0.02] * 50 + [0.004] * 50 + [0.0008] * 50)
