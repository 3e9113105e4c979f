"""Networks of torchvision by name, with the weights that it publishes or those of a file. Knows no clips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from protocol.errors import ConfigError


def network(name: str, file: str, known: list[str], param: str) -> tuple[nn.Module, Any]:
    """A network of torchvision in eval mode, and the transforms (mean, std, crop_size) that its published weights go
    with.

    Args:
        file: its state, .safetensors or what `torch.save` wrote; "": as published, downloaded at the first time.
        known: names to choose from. param: the setting to blame.

    Raises:
        ConfigError: there is no such network, or no such weights.
    """
    import torchvision

    if name not in known:
        raise ConfigError(f"torchvision has no {name!r}: choose one of {', '.join(known)}", param=param)
    weights = torchvision.models.get_model_weights(name).DEFAULT
    model = torchvision.models.get_model(name)
    state = read_state(Path(file), param) if file else _downloaded(weights, name, param)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ConfigError(f"{file or 'what is published'} has no weights of {name}: {error}", param=param) from error
    return model.eval(), weights.transforms()


def read_state(file: Path, param: str) -> dict[str, Tensor]:
    """Tensors by name, of a .safetensors file or of one that `torch.save` wrote; no code in it is run.

    Raises:
        ConfigError: the file is not there, or holds something else.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files fail in many ways, each library's its own
        raise ConfigError(f"cannot read weights from {file}: {error}", param=param) from error


def _downloaded(weights: Any, name: str, param: str) -> dict[str, Tensor]:
    try:
        return weights.get_state_dict(check_hash=True, weights_only=True)
    except OSError as error:
        raise ConfigError(
            f"cannot download the weights of {name} ({error}): say their file, as in torchvision:{name}:FILE",
            param=param,
        ) from error
