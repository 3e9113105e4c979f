from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils.data import TensorDataset

from trainer.data.batches import batches, batches_an_epoch, derive, schedule


def rows_of(chosen):
    return [row for batch in chosen for row in batch]


def test_every_row_once_an_epoch():
    chosen = schedule(rows=10, batch_size=4, steps=6, seed=0, iteration=2)
    assert [len(batch) for batch in chosen] == [4, 4, 2, 4, 4, 2]
    assert sorted(rows_of(chosen[:3])) == list(range(10))
    assert sorted(rows_of(chosen[3:])) == list(range(10))
    assert rows_of(chosen[:3]) != rows_of(chosen[3:])


def test_fixed_steps_cut_the_last_epoch():
    chosen = schedule(rows=10, batch_size=4, steps=5, seed=0, iteration=0)
    assert len(chosen) == 5
    assert max(Counter(rows_of(chosen)).values()) == 2


def test_nobody_is_alone_in_a_batch():
    assert [len(batch) for batch in schedule(rows=9, batch_size=4, steps=4, seed=0, iteration=0)] == [4, 5, 4, 5]
    assert [len(batch) for batch in schedule(rows=1, batch_size=4, steps=2, seed=0, iteration=0)] == [1, 1]
    assert [batches_an_epoch(rows, 4) for rows in (1, 4, 5, 6, 8, 9)] == [1, 1, 1, 2, 2, 2]


def test_order_depends_on_seed_and_iteration_only():
    first = schedule(8, 3, 6, seed=1, iteration=4)
    torch.rand(5)
    assert schedule(8, 3, 6, seed=1, iteration=4) == first
    assert schedule(8, 3, 6, seed=2, iteration=4) != first
    assert schedule(8, 3, 6, seed=1, iteration=5) != first


@pytest.mark.parametrize("workers", [0, 1])
def test_starting_late_gives_the_same_batches_and_leaves_the_global_generator(workers: int):
    images = torch.arange(8, dtype=torch.uint8)[:, None, None, None].expand(8, 2, 2, 3)
    data = TensorDataset(images, torch.arange(8), torch.arange(8) >= 6)
    chosen = schedule(8, 3, 6, seed=1, iteration=4)
    before = torch.get_rng_state()
    whole = list(batches(data, chosen, real=6, seed=1, iteration=4, workers=workers))
    late = list(batches(data, chosen, real=6, seed=1, iteration=4, start=2, workers=workers))
    assert torch.equal(torch.get_rng_state(), before)
    assert len(whole) == 6
    for one, other in zip(whole[2:], late, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.synthetic, other.synthetic)
        assert one.seed == other.seed
    assert len({batch.seed for batch in whole}) == 6


def test_processes_hold_parts_of_the_same_batches_some_of_them_no_rows():
    images = torch.arange(8, dtype=torch.uint8)[:, None, None, None].expand(8, 2, 2, 3)
    data = TensorDataset(images, torch.arange(8), torch.arange(8) >= 6)
    chosen = schedule(8, 3, 6, seed=1, iteration=4)
    whole = list(batches(data, chosen, real=6, seed=1, iteration=4))
    cuts = [lambda n: slice(0, 0), lambda n: slice(0, n - 1), lambda n: slice(n - 1, n)]
    parts = [list(batches(data, chosen, real=6, seed=1, iteration=4, part=part)) for part in cuts]
    for one, *held in zip(whole, *parts, strict=True):
        assert [len(part.images) for part in held] == [0, len(one.images) - 1, 1]
        assert torch.equal(torch.cat([part.images for part in held]), one.images)
        assert torch.equal(torch.cat([part.labels for part in held]), one.labels)
        assert torch.equal(one.synthetic, one.labels >= 6)
        assert all(torch.equal(part.synthetic, one.synthetic) and part.seed == one.seed for part in held)


def test_derived_seeds_differ_and_stay_the_same():
    assert derive(0, "order", 1, 2) == derive(0, "order", 1, 2)
    assert len({derive(0, "order", i, j) for i in range(20) for j in range(20)}) == 400
    assert all(0 <= derive("x", i) < 2**63 for i in range(100))
