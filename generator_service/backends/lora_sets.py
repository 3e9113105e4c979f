"""The files of a weight set of kind "lora": the LoRA of a UNet, and the visual tokens that it was trained with.

    pytorch_lora_weights.safetensors   in diffusers' format, or in that of kohya's scripts
    visual_tokens.safetensors          "class_means", float32 [classes, D]; absent without visual tokens

Knows nothing of which sets are resident, nor of when a token is used.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import convert_state_dict_to_diffusers, convert_unet_state_dict_to_peft
from peft import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from protocol.errors import WeightsCorrupt

LORA_FILE = "pytorch_lora_weights.safetensors"
VISUAL_FILE = "visual_tokens.safetensors"
CLASS_MEANS = "class_means"


def add_lora(unet: UNet2DConditionModel, folder: Path, adapter: str) -> None:
    """Load the LoRA in a folder as a named adapter of the UNet; its parameters get the UNet's device and dtype.

    Raises WeightsCorrupt when the file cannot be read, or was not made for a UNet of these shapes.
    """
    path = folder / LORA_FILE
    try:
        tensors, alphas, metadata = StableDiffusionLoraLoaderMixin.lora_state_dict(
            folder,
            weight_name=LORA_FILE,
            unet_config=unet.config,
            use_safetensors=True,
            local_files_only=True,
            return_lora_metadata=True,
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise WeightsCorrupt(f"{path} cannot be read ({error}): restore it or adapt again") from error
    _check_fits(unet, tensors, path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)  # several are what is wanted
        StableDiffusionLoraLoaderMixin.load_lora_into_unet(
            tensors, alphas, unet, adapter, metadata=metadata, low_cpu_mem_usage=True
        )


def write_lora(unet: UNet2DConditionModel, adapter: str, folder: Path, *, configured: bool = False) -> None:
    """Write an adapter of the UNet, as `load_lora_weights` of a diffusers pipeline reads it. Equal ones are equal
    files: with one entry of metadata, for several are written in any order, and its sets sorted.

    Args:
        configured: with its configuration, for a LoRA that is not of one rank, or whose alpha is not its rank.
    """
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet, adapter_name=adapter))
    metadata = {"format": "pt"}
    if configured:
        config = unet.peft_config[adapter].to_dict().items()
        told = {f"unet.{key}": sorted(value) if isinstance(value, set) else value for key, value in config}
        metadata = {LORA_ADAPTER_METADATA_KEY: json.dumps(told, sort_keys=True)}

    def save(tensors: dict[str, torch.Tensor], path: str) -> None:
        save_file(tensors, path, metadata=metadata)

    StableDiffusionLoraLoaderMixin.save_lora_weights(folder, unet_lora_layers=layers, save_function=save)


def read_class_means(folder: Path, classes: int, width: int) -> torch.Tensor:
    """Visual token of each class, float32 [classes, D] on the CPU. Raises WeightsCorrupt unless it has that shape."""
    path = folder / VISUAL_FILE
    try:
        means = load_file(path)[CLASS_MEANS]
    except (OSError, KeyError, SafetensorError) as error:
        raise WeightsCorrupt(f"{path} cannot be read ({error}): restore it or adapt again") from error
    if means.shape != (classes, width) or not means.isfinite().all():
        raise WeightsCorrupt(
            f"{path}: {CLASS_MEANS} is no finite table of shape {(classes, width)} but {tuple(means.shape)}: "
            "set the base checkpoint that it was made for, or adapt again"
        )
    return means.float()


def _check_fits(unet: UNet2DConditionModel, tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Raises WeightsCorrupt naming the first tensor that does not fit, with both shapes."""
    prefix = f"{StableDiffusionLoraLoaderMixin.unet_name}."
    if others := [name for name in tensors if not name.startswith(prefix)]:
        raise WeightsCorrupt(f"{path}: {others[0]} is not of a UNet: only LoRAs of the UNet are served, save one")
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    if not any("lora_A" in name for name in found):
        found = convert_unet_state_dict_to_peft(found)
    modules = dict(unet.named_modules())
    pairs = {name.split(".lora_")[0]: None for name in found}
    if not pairs:
        raise WeightsCorrupt(f"{path} holds no LoRA: restore it or adapt again")
    for name in pairs:
        down, up = found.get(f"{name}.lora_A.weight"), found.get(f"{name}.lora_B.weight")
        if down is None or up is None or not (down.isfinite().all() and up.isfinite().all()):
            raise WeightsCorrupt(f"{path}: the LoRA of {name} is not whole, or not finite: restore it or adapt again")
        if name not in modules:
            raise WeightsCorrupt(f"{path} was made for another base checkpoint: this one's UNet has no {name}")
        made_for, own = (up.shape[0], down.shape[1]), tuple(modules[name].weight.shape[:2])
        if made_for != own:
            raise WeightsCorrupt(
                f"{path} was made for another base checkpoint: {name} is {list(made_for)} there and {list(own)} here"
            )
