from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from trainer.data.identity_batches import batches_an_epoch, dealt, groups_of, identity_schedule
from trainer.settings import TrainerConfig


def test_market_shape_by_hand():
    """6 identities of 8 rows, P = 3, K = 4: 12 groups, 4 batches of 3 identities, every row exactly once."""
    labels = torch.arange(6).repeat_interleave(8)
    assert batches_an_epoch(labels, 48, 12, 4) == 4
    epoch = identity_schedule(labels, 48, 12, 4, 4, seed=0, iteration=0)
    assert sorted(row for batch in epoch for row in batch) == list(range(48))
    for batch in epoch:
        assert Counter(labels[batch].tolist()).most_common() == [
            (who, 4) for who in dict.fromkeys(labels[batch].tolist())
        ]
        assert len(set(labels[batch].tolist())) == 3


def test_synthetic_rows_are_spread_beside_real_ones():
    """One identity, 3 real and 9 synthetic rows, K = 4: three groups with a real row each."""
    rows = torch.tensor([0, 1, 2, *range(100, 109)])
    for seed in range(10):
        groups = dealt(rows, 100, 4, torch.Generator().manual_seed(seed))
        assert sorted(row for group in groups for row in group) == rows.tolist()
        assert [sum(row < 100 for row in group) for group in groups] == [1, 1, 1]


def test_groups_of_an_identity():
    assert groups_of(4, 0, 4) == 1 and groups_of(5, 0, 4) == 2
    assert groups_of(1, 3, 4) == 1 and groups_of(1, 4, 4) == 2 and groups_of(1, 6, 4) == 2 and groups_of(1, 7, 4) == 3
    assert groups_of(0, 8, 4) == 2  # none real: nothing to keep a place for


def test_an_identity_with_one_image_repeats_it():
    labels = torch.tensor([0, 0, 0, 1, 2, 2])
    batches = identity_schedule(labels, 6, 8, 4, 1, seed=3, iteration=0)
    assert batches_an_epoch(labels, 6, 8, 4) == 2
    epoch = identity_schedule(labels, 6, 8, 4, 2, seed=3, iteration=0)
    assert epoch[:1] == batches
    assert all(len(batch) == 8 for batch in epoch)  # three groups in two batches: the lonely one is joined
    assert max(Counter(row for batch in epoch for row in batch if row == 3).values()) >= 4


def test_one_identity_alone():
    assert identity_schedule(torch.zeros(3, dtype=torch.long), 3, 8, 2, 2, 0, 0) != []
    assert all(len(batch) == 2 for batch in identity_schedule(torch.zeros(3, dtype=torch.long), 3, 8, 2, 2, 0, 0))


def test_order_depends_on_seed_and_iteration_only():
    labels = torch.arange(10).repeat_interleave(5)
    first = identity_schedule(labels, 50, 8, 2, 9, seed=1, iteration=4)
    torch.rand(3)
    assert identity_schedule(labels, 50, 8, 2, 9, seed=1, iteration=4) == first
    assert identity_schedule(labels, 50, 8, 2, 9, seed=2, iteration=4) != first
    assert identity_schedule(labels, 50, 8, 2, 9, seed=1, iteration=5) != first
    number = batches_an_epoch(labels, 50, 8, 2)
    two = identity_schedule(labels, 50, 8, 2, 2 * number, seed=1, iteration=4)
    assert two[:number] != two[number:] and two[: len(first)] == first[: len(two)]


@given(
    counts=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12).filter(
        lambda counts: sum(map(sum, counts)) > 0
    ),
    each=st.integers(2, 5),
    identities=st.integers(1, 6),
    seed=st.integers(0, 99),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_what_holds_of_every_epoch(counts: list[tuple[int, int]], each: int, identities: int, seed: int):
    labels = torch.tensor(
        [who for who, (real, _) in enumerate(counts) for _ in range(real)]
        + [who for who, (_, made) in enumerate(counts) for _ in range(made)]
    )
    real, size = sum(real for real, _ in counts), identities * each
    present = {who for who, both in enumerate(counts) if sum(both)}
    number = batches_an_epoch(labels, real, size, each)
    epoch = identity_schedule(labels, real, size, each, number, seed, 0)
    assert len(epoch) == number
    assert {row for batch in epoch for row in batch} == set(range(len(labels)))  # every row at least once
    total = 0
    for batch in epoch:
        people = Counter(labels[batch].tolist())
        assert set(people.values()) == {each}  # K rows of each
        assert len(people) <= max(identities, 2) and len(people) >= min(2, len(present))
        for who in people:
            rows = [row for row in batch if labels[row] == who]
            if counts[who][0]:
                assert any(row < real for row in rows)
            if sum(counts[who]) >= each and counts[who][1] == 0:
                assert len(set(rows)) == each  # no repeats where there are enough
        total += len(people)
    groups = sum(groups_of(*both, each) for both in counts if sum(both))
    assert groups <= total <= groups + number  # about once


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 10, "images_per_identity": 4},
        {"images_per_identity": 1},
        {"batch_size": 4, "images_per_identity": 4},  # one identity alone
    ],
)
def test_batches_that_cannot_be_are_refused(tmp_path, wrong: dict):
    with pytest.raises(ValidationError, match="images_per_identity"):
        TrainerConfig.model_validate({"dataset": {"root": tmp_path}} | wrong)
