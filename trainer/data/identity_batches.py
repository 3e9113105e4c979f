"""Batches of P identities with K rows each (Hermans et al. 2017): what a batch-hard triplet loss looks for its
positives and negatives in.

Like `batches.schedule`, every draw follows from (seed, iteration, epoch). Knows labels; no images and no models.

Shapes: N rows, the real ones first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.data.batches import derive


def groups_of(real: int, synthetic: int, each: int) -> int:
    """Groups of `each` rows that hold every row of an identity, one real row at least in each if it has any."""
    groups = -(-(real + synthetic) // each)
    return max(groups, -(-synthetic // (each - 1))) if real else groups


def batches_an_epoch(labels: Tensor, real: int, batch_size: int, each: int) -> int:
    """Batches that hold every group of rows once, each identity at most once a batch.

    Args:
        labels: [N], int64. real: so many, the first ones, are real. batch_size: P * K. each: K >= 2.
    """
    groups = [groups_of(*counts, each) for counts in _counts(labels, real)]
    return max(-(-sum(groups) * each // batch_size), max(groups))


def identity_schedule(
    labels: Tensor, real: int, batch_size: int, each: int, steps: int, seed: int, iteration: int
) -> list[list[int]]:
    """Row indices of each of the iteration's batches.

    In an epoch every row is seen, and some more than once: the rows of an identity are dealt into groups of K, its real
    ones first, so that each group has one where the identity has any; places left over are filled with rows of its
    own, which repeats those of an identity that has fewer than K. Each group goes to one of the batches with the fewest
    groups so far that do not have its identity, so that batches differ by one group at most; where there are fewer
    groups than P for each batch, batches are smaller than P * K. A batch of one identity, which nothing could be told
    apart in, is given a second one.

    Args:
        steps: batches of the iteration; the last epoch may be cut. Others as `batches_an_epoch`.
    """
    number, chosen, epoch = batches_an_epoch(labels, real, batch_size, each), [], 0
    order = labels.argsort(stable=True)  # so of an identity the real rows come first
    members = [rows for rows in order.split(torch.bincount(labels).tolist()) if len(rows)]
    while len(chosen) < steps:
        generator = torch.Generator().manual_seed(derive(seed, "identities", iteration, epoch))
        chosen += _epoch(members, real, each, number, generator)
        epoch += 1
    return chosen[:steps]


def _counts(labels: Tensor, real: int) -> list[tuple[int, int]]:
    """Real and synthetic rows of each identity that has any."""
    length = int(labels.max()) + 1
    sides = (torch.bincount(side, minlength=length).tolist() for side in (labels[:real], labels[real:]))
    return [counts for counts in zip(*sides, strict=True) if sum(counts)]


def _epoch(members: list[Tensor], real: int, each: int, number: int, generator: torch.Generator) -> list[list[int]]:
    batches: list[list[int]] = [[] for _ in range(number)]
    load = torch.zeros(number)
    for identity in torch.randperm(len(members), generator=generator).tolist():
        groups = dealt(members[identity], real, each, generator)
        emptiest = (load + torch.rand(number, generator=generator)).argsort()[: len(groups)]
        for batch, group in zip(emptiest.tolist(), groups, strict=True):
            batches[batch] += group
        load[emptiest] += 1
    if len(members) > 1:
        for batch in (batch for batch, held in zip(batches, load.tolist(), strict=True) if held == 1):
            others = [rows for rows in members if batch[0] not in rows]
            other = others[int(torch.randint(len(others), (), generator=generator))]
            batch += dealt(other, real, each, generator)[0]
    return batches


def dealt(rows: Tensor, real: int, each: int, generator: torch.Generator) -> list[list[int]]:
    """An identity's rows in groups of `each`, all of them at least once, shuffled.

    Args:
        rows: [n], int64. real: rows below this number are real.
    """
    rows = rows[torch.randperm(len(rows), generator=generator)]
    is_real = rows < real
    own, made = rows[is_real].tolist(), rows[~is_real].tolist()
    groups: list[list[int]] = [[] for _ in range(groups_of(len(own), len(made), each))]
    for place in range(max(len(own), len(groups) if own else 0)):
        groups[place % len(groups)].append(own[place % len(own)])
    for row in made:
        min(groups, key=len).append(row)
    everything = own + made
    for group in groups:
        spare = [row for row in everything if row not in group] or everything
        while len(group) < each:
            again = torch.randperm(len(spare), generator=generator)[: each - len(group)]
            group += [spare[at] for at in again.tolist()]
    return groups
