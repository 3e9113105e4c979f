"""A LoRA of a Stable Diffusion's UNet while it is trained: added, used inside a step only, written, removed.

Knows nothing of losses, data or optimisers.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils import convert_state_dict_to_diffusers
from diffusers.utils.peft_utils import delete_adapter_layers
from peft import LoraConfig, get_peft_model_state_dict

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
            _remove(checkpoint)

    def __init__(self, checkpoint: SDCheckpoint, rank: int, seed: int):
        """Use `added`."""
        self._checkpoint, self._unet = checkpoint, checkpoint.unet
        config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=ATTENTION)
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)  # others may be served
            torch.manual_seed(seed)  # peft draws from the global generator
            self._unet.add_adapter(config, NAME)
        own = f".{NAME}."
        self.parameters = {name: value for name, value in self._unet.named_parameters() if own in name}
        for parameter in self.parameters.values():
            parameter.data = parameter.data.float()
        checkpoint.use(None)

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
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(self._unet, adapter_name=NAME))
        StableDiffusionLoraLoaderMixin.save_lora_weights(folder, unet_lora_layers=layers)


def _remove(checkpoint: SDCheckpoint) -> None:
    """Take it from every layer that it is in, be it but some: peft may have failed on the way."""
    if others := [name for name in getattr(checkpoint.unet, "peft_config", {}) if name != NAME]:
        checkpoint.use(others[0])  # an adapter that is active cannot be deleted without a warning
    delete_adapter_layers(checkpoint.unet, NAME)
    if others:
        checkpoint.use(None)
    else:
        checkpoint.unet._hf_peft_config_loaded = False  # diffusers says so before it adds the first
