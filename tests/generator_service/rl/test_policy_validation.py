from __future__ import annotations

import math

import numpy as np
import pytest

from generator_service.rl.policy_validation import each_action, report
from generator_service.rl.sampling_policy import actions
from protocol.policy import ActionSpace

TABLE = np.array([[4.0, 1.0, 3.0], [0.0, 5.0, 3.0], [1.0, 4.0, 4.0]])  # three states, three actions


def test_means_and_errors_by_hand():
    """Choices 4, 3, 4. Actions' means: 5/3, 10/3, 10/3; of equal ones the first is the fixed one: 1, 5, 4."""
    found = report(TABLE, np.array([0, 2, 1]))
    assert found["states"] == 3
    assert found["learned"] == {"mean": pytest.approx(11 / 3), "error": pytest.approx(math.sqrt(1 / 3) / math.sqrt(3))}
    assert found["random"]["mean"] == pytest.approx(25 / 9)
    assert found["fixed"] == {"mean": pytest.approx(10 / 3), "error": pytest.approx(2.081666 / 3**0.5), "action": 1}
    assert found["oracle"]["mean"] == pytest.approx(13 / 3)
    gains = np.array([3.0, -2.0, 0.0])
    assert found["gain"] == {"mean": pytest.approx(1 / 3), "error": pytest.approx(gains.std(ddof=1) / 3**0.5)}
    assert found["agrees"] == pytest.approx(2 / 3)


def test_a_single_state_has_no_error():
    found = report(TABLE[:1], np.array([0]))
    assert found["learned"] == {"mean": 4.0, "error": None} and found["agrees"] == 1.0


def test_every_action_is_told():
    space = ActionSpace(steps=[5, 10, 15], pairs=[(3.0, 2.0)])
    told = each_action(TABLE, np.array([0, 2, 0]), actions(space))
    assert [(one["steps"], one["a"], one["b"], one["chosen"]) for one in told] == [
        (5, 3.0, 2.0, 2),
        (10, 3.0, 2.0, 0),
        (15, 3.0, 2.0, 1),
    ]
    assert [one["mean"] for one in told] == pytest.approx([5 / 3, 10 / 3, 10 / 3])
