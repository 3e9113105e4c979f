"""Where a checkpoint lies: shipped with this package, in a folder, or on the Hugging Face hub.

Only safetensors and JSON are ever fetched, never pickles. Does not know what is inside the files.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download

from protocol.errors import ConfigError

EMBEDDED = "embedded"
SUFFIXES = ("json", "safetensors", "txt", "model")  # txt: a tokenizer's merges; model: SentencePiece's, no pickle
VARIANTS = "*.*.safetensors"  # the same tensors again in another precision


def locate(checkpoint: str, revision: str | None, components: Sequence[str], embedded: Path | None = None) -> Path:
    """The local folder of a diffusers checkpoint, fetched from the hub when `checkpoint` is not a folder.

    Args:
        checkpoint: a folder, a hub id such as "facebook/DiT-XL-2-256", or "embedded".
        revision: branch, tag or commit on the hub; None: its main branch.
        components: subfolders to have; what is not listed is not fetched.
        embedded: the folder that "embedded" stands for; None: there is no such checkpoint.

    Raises ConfigError when there is no such checkpoint.
    """
    if checkpoint == EMBEDDED and embedded is not None:
        return embedded
    files = [f"{component}/*.{suffix}" for component in components for suffix in SUFFIXES]
    return _locate("checkpoint", checkpoint, revision, "model_index.json", files, embedded is not None)


def locate_model(setting: str, model: str) -> Path:
    """The local folder of a single model, fetched from the hub when `model` is not a folder. Raises ConfigError.

    Args:
        setting: that names it, for the error.
    """
    return _locate(setting, model, None, "config.json", ["*.safetensors", "*.safetensors.index.json"], False)


def _locate(setting: str, name: str, revision: str | None, index: str, files: list[str], embedded: bool) -> Path:
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / index).is_file():
            raise ConfigError(f"{folder} has no {index}: point `{setting}` at a folder that has", param=setting)
        return folder.resolve()
    try:
        patterns = [index, *files]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=VARIANTS))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{setting} {name!r} is neither a folder here nor to be had from the Hugging Face hub "
            f"({type(error).__name__}): give an existing folder, a hub id this machine can reach"
            + (f", or {EMBEDDED!r}" if embedded else ""),
            param=setting,
        ) from error
