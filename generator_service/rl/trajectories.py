"""The transitions of a rollout: stored in a ring, or made again from each row's first noise when they are learnt from.

Both give the same transitions to the bit. Knows nothing of rewards or losses.

    n rows of a rollout, B of one batch, T denoising steps, C channels of the latents, h w their height and width

What making them again saves and costs: no latents are kept but one batch's present ones, where the ring holds n (T + 1)
of them (64 rows of 50 steps of 4 x 32 x 32: 54 MB). Each pass over the transitions takes one more forward pass without
gradients a step, about a third more time. They are made with the weights that sampled them, of which a copy is held
once a first optimiser step has changed the policy's: as much memory again as the trained parameters, little for a LoRA.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Protocol

import torch

from generator_service.rl.policy import Policy
from generator_service.rl.reverse_process import ReverseProcess, RowNoise, next_latents


@dataclass(frozen=True)
class Transitions:
    """Some steps of some rows, all on the policy's device; also without latents, of a whole batch, to be told which."""

    rows: torch.Tensor  # int64 [B], of the rollout
    labels: torch.Tensor  # int64 [B]
    steps: torch.Tensor  # int64 [B], numbers of denoising steps
    before: torch.Tensor  # float32 [B, C, h, w]: x_t
    after: torch.Tensor  # float32 [B, C, h, w]: x_{t-1}
    log_prob: torch.Tensor  # float32 [B], when they were sampled

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class SampledBatch:
    """Rows that were denoised together. The same rows in the same places make the same numbers, so they stay so."""

    rows: torch.Tensor  # int64 [B], of the rollout
    labels: torch.Tensor  # int64 [B]
    seeds: list[int]  # of each row's noise
    log_prob: torch.Tensor  # float32 [T, B]; 0 for a step without variance

    def transitions(self, step: int, before: torch.Tensor, after: torch.Tensor) -> Transitions:
        steps = torch.full_like(self.rows, step)
        return Transitions(self.rows, self.labels, steps, before, after, self.log_prob[step])


class Trajectories(Protocol):
    """What sampling fills and learning reads."""

    def begin(self, batch: int, first: torch.Tensor) -> None:
        """A batch of the rollout, by its number, and its first latents [B, C, h, w]."""
        ...

    def add(self, batch: int, step: int, latents: torch.Tensor) -> None:
        """What a step led to, [B, C, h, w]."""
        ...

    def read(self, number: int, batch: SampledBatch, steps: Sequence[int]) -> Iterator[Transitions]:
        """The transitions of these steps, which ascend, one step at a time. Outside `policy.in_use`."""
        ...

    def weights_change(self) -> None:
        """The policy is about to take an optimiser step, and transitions will be read after it."""
        ...


class Ring:
    """Latents of the last `capacity` batches, in memory that is taken once."""

    def __init__(self, capacity: int, rows: int, steps: int, shape: Sequence[int], device: torch.device, offload: bool):
        """
        Args:
            rows: of a batch, at most. steps: T. shape: (C, h, w).
            offload: they lie in the CPU's memory, pinned where the device is a GPU; copies run beside its work.
        """
        self._device = device
        home = torch.device("cpu") if offload else device
        self._latents = torch.empty(
            (capacity, steps + 1, rows, *shape), device=home, pin_memory=offload and device.type == "cuda"
        )
        self._held: list[int | None] = [None] * capacity  # which batch lies in each place

    def begin(self, batch: int, first: torch.Tensor) -> None:
        self._held[batch % len(self._held)] = batch
        self.add(batch, -1, first)

    def add(self, batch: int, step: int, latents: torch.Tensor) -> None:
        self._place(batch)[step + 1, : len(latents)].copy_(latents, non_blocking=True)

    def read(self, number: int, batch: SampledBatch, steps: Sequence[int]) -> Iterator[Transitions]:
        kept, size = self._place(number), len(batch.rows)
        for step in steps:
            before, after = (kept[at, :size].to(self._device, non_blocking=True) for at in (step, step + 1))
            yield batch.transitions(step, before, after)

    def weights_change(self) -> None:
        pass

    def _place(self, batch: int) -> torch.Tensor:
        assert self._held[batch % len(self._held)] == batch, f"batch {batch} was overwritten by a later one"
        return self._latents[batch % len(self._held)]


class Replay:
    """Keeps nothing of a batch but what it began with, and takes its steps again with the weights that sampled it."""

    def __init__(self, process: ReverseProcess):
        self._process = process
        self._sampled_with: dict[str, torch.Tensor] | None = None  # None: the policy's weights are still those

    def begin(self, batch: int, first: torch.Tensor) -> None:
        self._sampled_with = None  # a rollout begins after the last one was learnt from

    def add(self, batch: int, step: int, latents: torch.Tensor) -> None:
        pass

    def read(self, number: int, batch: SampledBatch, steps: Sequence[int]) -> Iterator[Transitions]:
        wanted, policy = set(steps), self._process.policy
        noise = RowNoise(batch.seeds, policy.space.latent_shape, policy.space.device)
        latents = noise.draw() * self._process.noise_scale
        for step in range(max(wanted, default=-1) + 1):
            after = self._step(latents, batch.labels, step, noise.draw())
            if step in wanted:
                yield batch.transitions(step, latents, after)
            latents = after

    def _step(self, latents: torch.Tensor, labels: torch.Tensor, step: int, noise: torch.Tensor) -> torch.Tensor:
        policy = self._process.policy
        with torch.no_grad(), _weights(policy, self._sampled_with), policy.in_use():
            _, transition = self._process.forward(latents, labels, torch.full_like(labels, step))
            return next_latents(transition, noise)

    def weights_change(self) -> None:
        if self._sampled_with is None:
            parameters = self._process.policy.parameters
            self._sampled_with = {name: value.detach().clone() for name, value in parameters.items()}


@contextmanager
def _weights(policy: Policy, weights: Mapping[str, torch.Tensor] | None) -> Iterator[None]:
    """The policy has these weights while the block runs; None: its own. Nothing is copied."""
    if weights is None:
        yield
        return
    own = {name: parameter.data for name, parameter in policy.parameters.items()}
    try:
        for name, parameter in policy.parameters.items():
            parameter.data = weights[name]
        yield
    finally:
        for name, parameter in policy.parameters.items():
            parameter.data = own[name]


def in_pieces(parts: Iterable[Transitions], size: int, batch_size: int) -> Iterator[Transitions]:
    """The same transitions in the same order, in pieces of at most `size`. Parts of up to `batch_size` are split where
    that is more, and joined as often as they fit in; else each is a piece, so that it stays what was sampled."""
    joined = max(1, size // batch_size)
    pieces = (piece for part in parts for piece in _split(part, size))
    while held := list(itertools.islice(pieces, joined)):
        yield _joined(held)


def _split(whole: Transitions, size: int) -> Iterator[Transitions]:
    columns = [getattr(whole, column.name).split(size) for column in fields(whole)]
    return (Transitions(*piece) for piece in zip(*columns, strict=True))


def _joined(parts: Sequence[Transitions]) -> Transitions:
    if len(parts) == 1:
        return parts[0]
    return Transitions(*(torch.cat([getattr(part, column.name) for part in parts]) for column in fields(Transitions)))
