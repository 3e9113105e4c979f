"""Checkpoints: everything that a run needs to go on as if it had not stopped.

A checkpoint is one file of tensors and plain values, loaded with `weights_only=True`, and a manifest with its sha256
that is written last: the manifest names the newest whole checkpoint, or does not exist. The last two files are kept.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from protocol.errors import CheckpointCorrupt
from trainer.durable import write_durably

MANIFEST = "checkpoint.json"
KEEP = 2


def save(folder: Path, state: dict[str, Any], *, updates: int) -> Path:
    """Write a checkpoint.

    Args:
        state: tensors, numbers, strings, and lists and dicts of them.
        updates: optimiser updates done; names the file.

    Raises:
        DiskFull: the newest checkpoint is still the one before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    digest = hashlib.sha256(data).hexdigest()
    path = folder / f"checkpoint-{updates:09d}-{digest[:8]}.pt"  # never the name of the one the manifest still names
    write_durably(path, data)
    write_durably(folder / MANIFEST, json.dumps({"file": path.name, "sha256": digest, "updates": updates}).encode())
    others = sorted(folder.glob("checkpoint-*.pt"), key=lambda other: (other == path, other.stat().st_mtime_ns))
    for old in others[:-KEEP]:
        old.unlink()
    return path


def load(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint; None when the folder has none.

    Raises:
        CheckpointCorrupt: the file is missing, cut short or altered.
    """
    manifest_path = folder / MANIFEST
    if not manifest_path.exists():
        return None
    try:
        manifest = json.loads(manifest_path.read_text())
        path, expected = folder / manifest["file"], manifest["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointCorrupt(f"{manifest_path} is not a checkpoint manifest. {_advice(folder)}") from error
    if not path.exists():
        raise CheckpointCorrupt(f"{path} is missing. {_advice(folder)}")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != expected:
        raise CheckpointCorrupt(f"{path} is corrupt: its sha256 differs from the manifest's. {_advice(folder)}")
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _advice(folder: Path) -> str:
    return f"Restore {folder} from a backup, or start the run anew with --fresh (its folder is then set aside)"


def rng_state() -> dict[str, Any]:
    """State of every library's global random generator."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    version, words, gauss = random.getstate()
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def load_rng_state(state: dict[str, Any]) -> None:
    """Put every global generator back to where `rng_state` found it."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
