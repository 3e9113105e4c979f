"""The file of a DiT's weight set of kind "lora": low-rank updates of its transformer's projections.

    transformer_lora.safetensors   "{layer}.lora_A.weight" [rank, in] and "{layer}.lora_B.weight" [out, rank], added
                                   once: the layer's weight is W + B A; in its metadata, the digest of what it is for

Attention's four projections get an update, and those that turn the class and time of a block into the scale and shift
of its norms: a DiT hears of its condition nowhere else. Knows nothing of which sets are resident.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from generator_service.backends import adapters
from protocol.errors import WeightsCorrupt

LORA_FILE = "transformer_lora.safetensors"
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "norm1.linear")


def write_lora(transformer: nn.Module, adapter: str, folder: Path, digest: str) -> None:
    """Write an adapter.

    Args:
        digest: of the weight set whose class tables it was trained with.
    """
    values = adapters.parameters(transformer, adapter).items()
    tensors = {name.replace(f".{adapter}.", "."): value.detach().cpu().contiguous() for name, value in values}
    save_file(tensors, folder / LORA_FILE, metadata={"made_for": digest})


def add_lora(transformer: nn.Module, adapter: str, folder: Path, digest: str, dtype: torch.dtype) -> None:
    """Put the LoRA of a folder into the transformer as a named adapter, with parameters of this type.

    Raises WeightsCorrupt when the file cannot be read, was made for something else, or does not fit.
    """
    tensors = _read(folder / LORA_FILE, digest)
    rank = _check_fits(transformer, tensors, folder / LORA_FILE)
    adapters.begin(transformer, adapter, rank, TARGETS, seed=0)
    for name, parameter in adapters.parameters(transformer, adapter).items():
        parameter.data = tensors[name.replace(f".{adapter}.", ".")].to(parameter.device, dtype)


def _read(path: Path, digest: str) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, "pt") as file:
            made_for = (file.metadata() or {}).get("made_for")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except (OSError, SafetensorError) as error:
        raise WeightsCorrupt(f"{path} cannot be read ({error}): restore it or tune again") from error
    if made_for != digest:
        raise WeightsCorrupt(f"{path} was made for another base: serve the one that it was tuned on, or tune again")
    return tensors


def _check_fits(transformer: nn.Module, tensors: dict[str, torch.Tensor], path: Path) -> int:
    """The rank. Raises WeightsCorrupt naming the first tensor that does not fit."""
    ends = tuple(f".{target}.weight" for target in TARGETS)
    found = {name: tensor.shape for name, tensor in tensors.items()}
    rank = next((shape[0] for name, shape in found.items() if name.endswith(".lora_A.weight") and shape), 0)
    expected = {}
    for name, now in adapters.base_names(transformer).items():
        if name.endswith(ends):
            layer, (outputs, inputs) = name.removesuffix(".weight"), transformer.get_parameter(now).shape
            expected[f"{layer}.lora_A.weight"] = torch.Size([rank, inputs])
            expected[f"{layer}.lora_B.weight"] = torch.Size([outputs, rank])
    for name in sorted(expected.keys() | found.keys()):
        if rank < 1 or found.get(name) != expected.get(name):
            raise WeightsCorrupt(
                f"{path} was made for another base: {name} is {found.get(name)} there and has to be "
                f"{expected.get(name)} here; serve the one that it was tuned on, or tune again"
            )
        if not tensors[name].isfinite().all():
            raise WeightsCorrupt(f"{path}: {name} is not finite: restore it or tune again")
    return rank
