"""One component of a diffusers checkpoint, read from its folder onto a device and frozen.

Serves models of diffusers and of transformers alike; only safetensors and JSON are read, never pickles. Knows nothing
of what the components are for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors import SafetensorError

from protocol.errors import ConfigError, WeightsCorrupt

DERIVED = ("pos_embed.pos_embed", "position_ids")  # computed from the configuration; older checkpoints store them


def read_json(path: Path) -> dict[str, Any]:
    """Raises ConfigError."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): the folder must be a diffusers checkpoint") from error


def load_component(
    kind: type[Any], folder: Path, device: torch.device, dtype: torch.dtype, *, partial: bool = False
) -> Any:
    """A model in evaluation mode, whose parameters take no gradients.

    Args:
        kind: a model class of diffusers or transformers.
        partial: the folder may hold more than this model, as that of a whole CLIP does when only its vision is wanted.

    Raises ConfigError when the folder does not hold such a model; WeightsCorrupt when its tensors do not fit it.
    """
    read_json(folder / "config.json")
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(f"{folder} holds no safetensors, and pickles are never read: convert the checkpoint first")
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()  # of reading a file, in the middle of a service's log
    cast = {"torch_dtype" if issubclass(kind, diffusers.ModelMixin) else "dtype": dtype}
    try:
        model, report = kind.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, local_files_only=True, **cast
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise WeightsCorrupt(f"{folder} cannot be loaded ({error}): fetch or make the checkpoint again") from error
    surplus = {key for key in report["unexpected_keys"] if not key.endswith(DERIVED)}
    wrong = set(report["missing_keys"]) | (set() if partial else surplus)
    if wrong or report["mismatched_keys"] or report["error_msgs"]:
        raise WeightsCorrupt(f"{folder}: tensors do not fit its config.json, among them {sorted(wrong)[:3]}")
    return model.eval().requires_grad_(False).to(device)
