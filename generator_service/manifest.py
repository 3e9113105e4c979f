"""What is written of a folder of weights: the sha256 of each file, and the manifest that tells what they are.

Knows nothing of names, versions or bases, nor of what the tensors mean.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from protocol.errors import WeightsCorrupt

MANIFEST = "manifest.json"


class Manifest(BaseModel):
    """What is written of a set beside its files."""

    model_config = ConfigDict(strict=True, frozen=True)

    backend: str
    kind: str
    base: str  # "name@version"
    base_digest: str | None = None  # of that set; None: written before it was recorded
    classes: list[str]
    created: float  # unix seconds
    digest: str  # of `files`
    files: dict[str, str]  # path within the folder -> sha256
    metadata: dict[str, Any]


def read_manifest(folder: Path) -> Manifest:
    """Raises WeightsCorrupt when it is missing or wrong."""
    path = folder / MANIFEST
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise WeightsCorrupt(f"{path} cannot be read ({error.strerror}): restore it or adapt again") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise WeightsCorrupt(f"{path} is wrong ({where}: {first['msg']}): restore it or adapt again") from error


def hash_files(folder: Path) -> dict[str, str]:
    """Path within the folder -> sha256, for every file but the manifest."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / MANIFEST:
            with path.open("rb") as file:
                found[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def digest(files: Mapping[str, str]) -> str:
    """One sha256 for what `hash_files` found."""
    return hashlib.sha256("".join(f"{name}\0{files[name]}\n" for name in sorted(files)).encode()).hexdigest()


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Readers find the file as it was, or the new one whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    temporary.write_text(json.dumps(document, indent=2))
    os.replace(temporary, path)
