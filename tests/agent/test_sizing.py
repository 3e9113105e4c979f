"""The model of throughput against numbers worked out by hand, and `onthefly size` around it."""

from __future__ import annotations

import pytest

from agent import cli
from agent.sizing import Load


def test_the_longer_side_sets_the_pace_when_they_overlap():
    load = Load(samples=120, train_s=10.0, rate=4.0, overhead_s=0.5)  # one replica: 30 s, three: 10 s, six: 5 s
    assert [load.generate_s(replicas) for replicas in (1, 3, 6)] == [30.0, 10.0, 5.0]
    assert [load.async_s(replicas) for replicas in (1, 3, 6)] == [30.5, 10.5, 10.5]
    assert [load.sync_s(replicas) for replicas in (1, 3, 6)] == [40.5, 20.5, 15.5]


@pytest.mark.parametrize(("samples", "needed"), [(1, 1), (40, 1), (41, 2), (120, 3), (121, 4)])
def test_the_fewest_replicas_that_keep_up(samples: int, needed: int):
    load = Load(samples=samples, train_s=10.0, rate=4.0)
    assert load.replicas() == needed
    assert load.async_s(needed) == 10.0
    assert needed == 1 or load.async_s(needed - 1) > 10.0


def test_size_says_how_many_and_what_fewer_would_cost(capsys: pytest.CaptureFixture[str]):
    arguments = ["size", "--samples", "120", "--train-seconds", "10", "--rate", "4", "--replicas", "2"]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.splitlines() == [
        "generators that the trainer never waits for: 3",
        "an iteration with 1: async 30.0 s, sync 40.0 s; async, the trainer waits 67% of it",
        "an iteration with 2: async 15.0 s, sync 25.0 s; async, the trainer waits 33% of it",
        "an iteration with 3: async 10.0 s, sync 20.0 s; async, the trainer waits 0% of it",
    ]


@pytest.mark.parametrize("rate", ["0", "-1", "inf", "nan", "fast"])
def test_numbers_that_cannot_be_measured_are_refused(rate: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        cli.main(["size", "--samples", "120", "--train-seconds", "10", "--rate", rate])
    assert "--rate" in capsys.readouterr().err
