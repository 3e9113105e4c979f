"""The order in which a training set is seen, and the batches made of it.

Every permutation and every augmentation seed follows from (seed, iteration, epoch, batch), so a loader's position is
just how many batches of the iteration are done, and a resumed run goes on with the same batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


@dataclass(frozen=True)
class Batch:
    """One mixed batch: B rows, b of them held by this process, S pixels a side."""

    images: Tensor  # uint8 [b, S, S, 3]
    labels: Tensor  # long [b]
    synthetic: Tensor  # bool [B]: of the whole batch
    seed: int  # of the whole batch's augmentation


def derive(*parts: int | str) -> int:
    """A seed in [0, 2**63) that depends on all parts and on nothing else."""
    text = ":".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def batches_an_epoch(rows: int, batch_size: int) -> int:
    """Batches of one pass over all rows. A last row that would be alone joins the batch before it: batch statistics
    want two."""
    alone = rows > batch_size and rows % batch_size == 1
    return -(-rows // batch_size) - alone


def schedule(rows: int, batch_size: int, steps: int, seed: int, iteration: int) -> list[list[int]]:
    """Row indices of each of the iteration's batches: epoch after epoch, each a fresh permutation of all rows."""
    batches: list[list[int]] = []
    epoch = 0
    while len(batches) < steps:
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(derive(seed, "order", iteration, epoch)))
        cuts = [batch_size * number for number in range(1, batches_an_epoch(rows, batch_size))]
        batches += [chunk.tolist() for chunk in order.tensor_split(cuts)]
        epoch += 1
    return batches[:steps]


def whole(rows: int) -> slice:
    """The part of a process that holds all rows."""
    return slice(0, rows)


def batches(
    data: Dataset,
    chosen: list[list[int]],
    *,
    real: int,
    seed: int,
    iteration: int,
    start: int = 0,
    workers: int = 0,
    part: Callable[[int], slice] = whole,
) -> Iterator[Batch]:
    """The batches of one iteration, from number `start` on.

    Args:
        real: so many rows of the data, the first ones, are real.
        part: which rows of a batch of so many this process loads.
    """
    own = torch.Generator().manual_seed(derive(seed, "workers", iteration))  # the global RNG is left to the model
    loaded = [rows[part(len(rows))] or rows[:1] for rows in chosen[start:]]  # a loader wants a row in each batch
    loader = DataLoader(data, batch_sampler=loaded, num_workers=workers, generator=own)
    for number, (images, labels, _) in enumerate(loader, start):
        rows = chosen[number]
        held = len(rows[part(len(rows))])
        synthetic = torch.tensor(rows) >= real
        yield Batch(images[:held], labels[:held], synthetic, derive(seed, "augment", iteration, number))
