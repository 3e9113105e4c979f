"""Captions written into a dataset folder, as `metadata.jsonl`, for `dataset` to read.

Only pictures without a caption get one; what the file says otherwise stays as it is. Class folders get the file, with
every picture's name and label. Knows nothing of how captions are made.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from protocol.dataset_layout import METADATA, check_root, list_split, parse_metadata, split_folder
from protocol.disk import full_disk_told
from protocol.errors import DatasetError


def has_caption(row: Mapping[str, Any]) -> bool:
    """Whether a row of metadata has a caption that says something."""
    caption = row.get("caption", row.get("text"))
    return isinstance(caption, str) and bool(caption.strip())


def add_captions(root: Path, split: str | None, captions: Mapping[str, str]) -> int:
    """Give captions to pictures that have none, durably: the file is as before or whole. Returns how many got one.

    Args:
        captions: by `Entry.relative`; pictures that the folder does not list are left out.

    Raises:
        DatasetError: the folder's metadata are wrong, or cannot be written. DiskFull: they are as they were.
    """
    check_root(root, split)
    path = split_folder(root, split) / METADATA
    body = path.read_bytes() if path.exists() else _from_folders(root, split)
    lines, added = [], 0
    for item, line in parse_metadata(body, root, path):
        row = json.loads(line)
        caption = captions.get(item.relative, "").strip()
        if caption and not has_caption(row):
            line = json.dumps(row | {"caption": caption}, ensure_ascii=False).encode()
            added += 1
        lines.append(line)
    if added:
        _write(path, b"\n".join(lines) + b"\n")
    return added


def _from_folders(root: Path, split: str | None) -> bytes:
    prefix = "" if split is None else f"{split_folder(root, split).name}/"
    rows = [
        {"file_name": item.on_disk.removeprefix(prefix), "label": item.label}
        | ({} if item.camera is None else {"camera": item.camera})
        for item in list_split(root, split)
    ]
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


def _write(path: Path, body: bytes) -> None:
    """Beside the file, to the disk, and then in its place."""
    target = path.resolve()  # it may be a link
    partial = target.with_name(f".{target.name}.partial")
    try:
        with full_disk_told(target), partial.open("wb") as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    except PermissionError as error:
        raise DatasetError(f"cannot write {target} ({error.strerror}): make its folder writable") from error
    finally:
        partial.unlink(missing_ok=True)
