"""Where a checkpoint lies: shipped with this package, in a folder, or on the Hugging Face hub.

Only safetensors and JSON are ever fetched, never pickles. Does not know what is inside the files.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download

from protocol.errors import ConfigError

EMBEDDED = "embedded"


def locate(checkpoint: str, revision: str | None, embedded: Path, components: Sequence[str]) -> Path:
    """The local folder of a diffusers checkpoint, fetched from the hub when `checkpoint` is not a folder.

    Args:
        checkpoint: "embedded", a folder, or a hub id such as "facebook/DiT-XL-2-256".
        revision: branch, tag or commit on the hub; None: its main branch.
        embedded: the folder that "embedded" stands for.
        components: subfolders to have; what is not listed is not fetched.

    Raises ConfigError when there is no such checkpoint.
    """
    if checkpoint == EMBEDDED:
        return embedded
    folder = Path(checkpoint).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ConfigError(f"{folder} has no model_index.json: point `checkpoint` at a diffusers folder")
        return folder.resolve()
    files = [f"{component}/*.{suffix}" for component in components for suffix in ("json", "safetensors")]
    try:
        return Path(snapshot_download(checkpoint, revision=revision, allow_patterns=["model_index.json", *files]))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"checkpoint {checkpoint!r} is neither a folder here nor to be had from the Hugging Face hub "
            f"({type(error).__name__}): give an existing folder, a hub id this machine can reach, "
            f"or {EMBEDDED!r}"
        ) from error
