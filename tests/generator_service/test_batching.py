from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from generator_service.backends.interface import Row, Sampling, WeightSet
from generator_service.batching import Batch, Batcher, Generation
from protocol.messages import WeightsRef

DDIM = Sampling(steps=4, scheduler="ddim")


def weight_set(version: int = 1) -> WeightSet:
    ref = WeightsRef(name="base", version=version, digest=f"d{version}")
    return WeightSet(ref, "dit", "full", None, ("a", "b"), Path("."))


def generation(*seeds: int, sampling: Sampling = DDIM, version: int = 1, **more) -> Generation:
    return Generation(weight_set(version), sampling, [Row(seed=seed, label=0) for seed in seeds], **more)


def seeds(batch: Batch | None) -> list[int] | None:
    return None if batch is None else [row.seed for row in batch.rows]


def test_equal_keys_share_a_batch_and_rows_keep_their_order():
    batcher = Batcher(8, 0.0)
    batcher.add(generation(1, 2), 0.0)
    batcher.add(generation(3), 0.0)
    assert seeds(batcher.take(0.0)) == [1, 2, 3]
    assert batcher.take(0.0) is None


@pytest.mark.parametrize(
    "other",
    [
        {"sampling": replace(DDIM, steps=5)},
        {"sampling": replace(DDIM, scheduler="dpm-solver")},
        {"sampling": replace(DDIM, strength=0.5)},
        {"sampling": replace(DDIM, guided=True)},
        {"version": 2},
    ],
    ids=lambda other: str(other),
)
def test_any_other_key_is_a_batch_of_its_own(other: dict):
    batcher = Batcher(8, 0.0)
    batcher.add(generation(1), 0.0)
    batcher.add(generation(2, **other), 0.0)
    batcher.add(generation(3), 0.0)
    assert [seeds(batcher.take(0.0)), seeds(batcher.take(0.0))] == [[1, 3], [2]]


def test_a_long_request_is_split_and_filled_up():
    batcher = Batcher(4, 0.0)
    batcher.add(generation(1, 2, 3, 4, 5, 6), 0.0)
    batcher.add(generation(7, 8, 9), 0.0)
    assert [seeds(batcher.take(0.0)) for _ in range(4)] == [[1, 2, 3, 4], [5, 6, 7, 8], [9], None]


def test_a_batch_that_is_not_full_waits_for_its_window():
    batcher = Batcher(3, 1.0)
    batcher.add(generation(1), 10.0)
    assert (batcher.take(10.5), batcher.due()) == (None, 11.0)
    batcher.add(generation(2), 10.6)
    assert batcher.due() == 11.0  # counted from the oldest
    assert seeds(batcher.take(11.0)) == [1, 2]


def test_a_full_batch_does_not_wait():
    batcher = Batcher(2, 1.0)
    batcher.add(generation(1), 0.0)
    batcher.add(generation(2), 0.0)
    assert seeds(batcher.take(0.0)) == [1, 2]


def test_a_full_batch_of_another_key_passes_one_that_waits():
    batcher = Batcher(2, 1.0)
    batcher.add(generation(1), 0.0)
    batcher.add(generation(2, 3, version=2), 0.1)
    assert seeds(batcher.take(0.1)) == [2, 3]
    assert batcher.take(0.1) is None


def test_the_window_counts_from_the_end_of_the_last_batch():
    batcher = Batcher(8, 1.0)
    batcher.add(generation(1), 0.0)
    batcher.batch_ended(5.0)
    assert (batcher.take(5.5), batcher.due()) == (None, 6.0)


def test_the_lanes_take_turns_when_both_wait():
    batcher = Batcher(1, 0.0)
    for seed in (1, 2, 3):
        batcher.add(generation(seed), 0.0)
        batcher.add(generation(10 * seed, lane="queue", alone=True), 0.0)
    assert [seeds(batcher.take(0.0)) for _ in range(6)] == [[1], [10], [2], [20], [3], [30]]


def test_a_unit_that_runs_alone_is_neither_merged_nor_split_nor_delayed():
    batcher = Batcher(2, 1.0)
    batcher.add(generation(1), 0.0)
    batcher.add(generation(2, 3, 4, lane="queue", alone=True), 0.0)
    assert seeds(batcher.take(0.0)) == [2, 3, 4]
    assert batcher.take(0.0) is None


def test_units_that_may_merge_fill_up_batches_of_requests():
    batcher = Batcher(4, 0.0)
    batcher.add(generation(1), 0.0)
    batcher.add(generation(2, 3, lane="queue"), 0.0)
    assert seeds(batcher.take(0.0)) == [1, 2, 3]


def test_removed_rows_are_not_taken():
    batcher = Batcher(2, 0.0)
    unwanted, wanted = generation(1, 2, 3), generation(4)
    batcher.add(unwanted, 0.0)
    batcher.add(wanted, 0.0)
    assert seeds(batcher.take(0.0)) == [1, 2]
    batcher.remove(unwanted)
    assert seeds(batcher.take(0.0)) == [4]


@given(
    st.lists(st.tuples(st.integers(1, 7), st.integers(1, 3), st.sampled_from(["request", "queue"]), st.booleans())),
    st.integers(1, 5),
)
def test_every_row_is_taken_once_in_batches_of_one_key(wanted, max_batch):
    batcher = Batcher(max_batch, 0.0)
    for number, (rows, version, lane, alone) in enumerate(wanted):
        row_seeds = [100 * number + row for row in range(rows)]
        batcher.add(generation(*row_seeds, version=version, lane=lane, alone=alone), 0.0)
    taken = []
    while (batch := batcher.take(0.0)) is not None:
        assert len({g.key for g in batch.generations}) == 1
        alone = [g for g in batch.generations if g.alone]
        assert (len(batch.generations) == 1 and seeds(batch) == [r.seed for r in alone[0].rows]) if alone else True
        assert alone or len(batch.rows) <= max_batch
        taken += seeds(batch)
    assert sorted(taken) == [100 * n + row for n, (rows, *_) in enumerate(wanted) for row in range(rows)]
    assert (batcher.waiting_rows("request"), batcher.waiting_rows("queue")) == (0, 0)
