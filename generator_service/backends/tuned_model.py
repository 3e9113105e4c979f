"""The files of a weight set that brings a tuned model of its own: a DiT's transformer or a Stable Diffusion's UNet.

    transformer/ or unet/   config.json and diffusion_pytorch_model.safetensors as diffusers reads them, in float32; in
                            the latter's metadata, the digest of the full checkpoint whose other parts it is served with

Knows nothing of which sets are resident, nor of how a model was tuned.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from generator_service.backends.adapters import ADAPTER, WRAPPED
from generator_service.backends.components import load_component, read_json
from protocol.errors import ConfigError, WeightsCorrupt

MODEL_FILE = "diffusion_pytorch_model.safetensors"


def write_model(
    model: ModelMixin, parameters: Mapping[str, torch.Tensor], folder: Path, digest: str, **changed: Any
) -> None:
    """Write a model of `model`'s kind that has these parameters. Adapters of `model` are left out.

    Args:
        parameters: all of them, by their names without adapters. folder: made here.
        digest: of the full checkpoint that the model belongs to.
        changed: what is different in its configuration.
    """
    folder.mkdir()
    own = {name.replace(WRAPPED, ""): value for name, value in model.state_dict().items() if ADAPTER not in name}
    tensors = {name: parameters.get(name, value).detach().cpu().contiguous() for name, value in own.items()}
    save_file(tensors, folder / MODEL_FILE, metadata={"checkpoint": digest})
    config = {key: value for key, value in json.loads(model.to_json_string()).items() if key != "_name_or_path"}
    (folder / "config.json").write_text(json.dumps(config | changed, indent=2, sort_keys=True))


def read_model(
    like: ModelMixin, folder: Path, device: torch.device, dtype: torch.dtype, digest: str, **changed: Any
) -> ModelMixin:
    """What `write_model` left in a folder, frozen. Raises WeightsCorrupt unless it fits exactly.

    Args:
        like: the model in whose place it comes. digest: of the full checkpoint that it is served with.
        changed: what has to be different in its configuration.
    """
    path = folder / MODEL_FILE
    try:
        with safe_open(path, "pt") as file:
            made_for = (file.metadata() or {}).get("checkpoint")
        config = read_json(folder / "config.json")
    except (OSError, SafetensorError, ConfigError) as error:
        raise WeightsCorrupt(f"{folder} cannot be read ({error}): restore it or tune again") from error
    if made_for != digest:
        raise WeightsCorrupt(f"{path} was tuned on another checkpoint: serve that one, or tune again")
    expected = json.loads(like.to_json_string()) | changed
    wrong = [key for key in sorted(expected.keys() | config.keys()) if config.get(key) != expected.get(key)]
    if differing := [key for key in wrong if not key.startswith("_")]:
        key = differing[0]
        raise WeightsCorrupt(
            f"{folder}/config.json: {key} is {config.get(key)!r} there and has to be {expected.get(key)!r}: restore it "
            "or tune again"
        )
    model = load_component(type(like), folder, device, dtype)
    for name, value in model.named_parameters():
        if not value.isfinite().all():
            raise WeightsCorrupt(f"{path}: {name} is not finite: restore it or tune again")
    return model
