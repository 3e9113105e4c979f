"""A LoRA of a Stable Diffusion's UNet while it is trained: added, used inside a step only, written, removed.

Knows nothing of losses, data or optimisers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from generator_service.backends import adapters
from generator_service.backends.lora_sets import write_lora
from generator_service.backends.sd_checkpoint import SDCheckpoint

NAME = "in-training"  # among the adapters of the UNet
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]  # the projections that get an update


class LoraAdapter:
    """Low-rank updates of the attention projections, in float32 whatever the UNet's own type; they begin at zero."""

    @classmethod
    @contextmanager
    def added(cls, checkpoint: SDCheckpoint, rank: int, seed: int) -> Iterator[LoraAdapter]:
        """In the UNet while the block runs; then, or when it cannot be added, the UNet is as it was."""
        try:
            yield cls(checkpoint, rank, seed)
        finally:
            adapters.remove(checkpoint.unet, NAME)

    def __init__(self, checkpoint: SDCheckpoint, rank: int, seed: int):
        """Use `added`."""
        self._checkpoint, self._unet = checkpoint, checkpoint.unet
        adapters.begin(self._unet, NAME, rank, ATTENTION, seed)
        self.parameters = adapters.parameters(self._unet, NAME)
        for parameter in self.parameters.values():
            parameter.data = parameter.data.float()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """The checkpoint predicts with this LoRA, whose parameters take gradients; afterwards with none."""
        self._checkpoint.use(NAME)
        try:
            yield
        finally:
            self._checkpoint.use(None)

    def state(self) -> dict[str, torch.Tensor]:
        """A copy of the parameters, on the CPU."""
        return {name: value.detach().cpu().clone() for name, value in self.parameters.items()}

    @torch.no_grad()
    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """What `state` gave."""
        for name, value in self.parameters.items():
            value.copy_(state[name])

    def save(self, folder: Path) -> None:
        """Write `pytorch_lora_weights.safetensors`, as `load_lora_weights` of a diffusers pipeline reads it."""
        write_lora(self._unet, NAME, folder)
