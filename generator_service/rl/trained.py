"""What of a model is trained by reward: a LoRA, or all parameters; beside it the frozen model, which stays as it is.

Knows nothing of what the model predicts, nor of files.

Memory, for N parameters of the model: a LoRA needs next to nothing, twice that when it goes on from another, which is
kept as the reference. All parameters: 4N bytes for those that are trained, in float32 whatever the model's own type,
and as much for their gradients; there is no second module, for they are put in the place of the model's own in each
forward pass. In half precision a pass casts them, and keeps that copy of 2N bytes for its backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import nn

from generator_service.backends import adapters

Use = Callable[[str | None], None]
"""Makes one adapter of the model count, or none: `use` of its checkpoint."""

NAME = "in-tuning"  # among the adapters of the model
REFERENCE = "tuned-from"  # the LoRA that it began as


class Trained(Protocol):
    """Parameters in training, and the passes with and without them."""

    use: Use
    parameters: Mapping[str, nn.Parameter]  # by names that do not depend on which adapters the model has

    def tuned(self) -> Mapping[str, torch.Tensor]:
        """From now on the model counts as trained, with these in the place of its own parameters of these names."""
        ...

    def frozen(self) -> AbstractContextManager[None]:
        """The model as it was before training, while the block runs; then as trained."""
        ...


class LoraWeights:
    """A LoRA, in float32 whatever the model's own type."""

    @classmethod
    @contextmanager
    def added(
        cls,
        model: nn.Module,
        use: Use,
        rank: int,
        targets: Sequence[str],
        seed: int,
        copied: Callable[[str], None] | None,
    ) -> Iterator[LoraWeights]:
        """In the model while the block runs; then, or when it cannot be added, the model is as it was.

        Args:
            rank, targets, seed: of one that begins at zero.
            copied: puts in an adapter of the name it is given, which is where training begins; None: at zero.
        """
        try:
            if copied is None:
                adapters.begin(model, NAME, rank, targets, seed)
            else:
                copied(NAME)
                copied(REFERENCE)
            yield cls(model, use, None if copied is None else REFERENCE)
        finally:
            for name in (NAME, REFERENCE):
                adapters.remove(model, name)

    def __init__(self, model: nn.Module, use: Use, reference: str | None):
        """Use `added`."""
        self.use, self._reference = use, reference
        self.parameters = adapters.parameters(model, NAME)
        held = adapters.parameters(model, REFERENCE) if reference else {}
        for parameter in (*self.parameters.values(), *held.values()):
            parameter.data = parameter.data.float()
        use(None)

    def tuned(self) -> Mapping[str, torch.Tensor]:
        """See `Trained`: nothing is put in the place of anything."""
        self.use(NAME)
        return {}

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """See `Trained`. Its end matters to gradients: autograd passes over parameters that require none by then."""
        self.use(self._reference)
        try:
            yield
        finally:
            self.use(NAME)


class FullWeights:
    """A copy of all parameters, in float32. The model's own are the reference."""

    def __init__(self, model: nn.Module, use: Use, replaced: Mapping[str, torch.Tensor]):
        """replaced: parameters that begin with other values, or shapes, than the model's own."""
        self.use, self._model = use, model
        names = adapters.base_names(model)
        values = {name: replaced.get(name, model.get_parameter(now)) for name, now in names.items()}
        self.parameters = {name: nn.Parameter(value.detach().float().clone()) for name, value in values.items()}

    def tuned(self) -> Mapping[str, torch.Tensor]:
        """See `Trained`: all of them."""
        self.use(None)
        return {now: self.parameters[name] for name, now in adapters.base_names(self._model).items()}

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """See `Trained`."""
        self.use(None)
        yield


class TrainedPolicy:
    """What policies of every backend have in common: their parameters, and when these count."""

    def __init__(self, trained: Trained):
        self._trained = trained
        self.parameters = trained.parameters

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """See `policy.Policy`."""
        self._trained.tuned()
        try:
            yield
        finally:
            self._trained.use(None)

    def state(self) -> dict[str, torch.Tensor]:
        """See `policy.Policy`."""
        return {name: value.detach().cpu().clone() for name, value in self.parameters.items()}

    @torch.no_grad()
    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """See `policy.Policy`."""
        for name, value in self.parameters.items():
            value.copy_(state[name])


def guided(output: torch.Tensor, guidance_scale: float, channels: int) -> torch.Tensor:
    """A conditional and an unconditional pass as one prediction: u + s (c - u).

    Args:
        output: [2B, C or 2C, h, w], the conditional rows first. channels: C; the others, which tell a variance, are the
            conditional pass's.

    Returns [B, C or 2C, h, w].
    """
    conditional, unconditional = output.chunk(2)
    free = unconditional[:, :channels]
    combined = free + guidance_scale * (conditional[:, :channels] - free)
    return torch.cat([combined, conditional[:, channels:]], dim=1)
