"""The bytes that queue entries point to (claim check): on the broker under keys of their own, or in a shared folder.

Knows nothing of what the bytes hold, nor of streams. A blob's name ends in part of its digest, so that two writers of
different bytes never share a name.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from pathlib import Path
from urllib.parse import quote

import redis

from protocol import codec, keys
from protocol.disk import full_disk_told
from protocol.entries import BlobRef
from protocol.errors import BlobCorrupt, BlobMissing, ConfigError


class BlobStore:
    """Reads and writes blobs. Errors of the client library pass through: `Bus` translates them."""

    def __init__(self, client: redis.Redis, folder: Path | None, ttl_s: int):
        """`folder`: shared by all processes of the run; None: on the broker. `ttl_s`: life of a blob nobody drops."""
        self._client = client
        self._folder = folder
        self._ttl_s = ttl_s
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._sweep(folder)

    def ref(self, blob_id: str, data: bytes) -> BlobRef:
        """Where `data` will lie and what it must be; writes nothing."""
        sha256 = codec.digest(data)
        name = f"{quote(blob_id, safe='')}.{sha256[:16]}"
        ref = f"redis:{keys.blob(name)}" if self._folder is None else f"file:{name}.blob"
        return BlobRef(ref=ref, sha256=sha256, size=len(data))

    def put(self, ref: BlobRef, data: bytes) -> None:
        if self.key(ref):
            self._client.set(self.key(ref), data, ex=self._ttl_s)
        else:
            self.put_file(ref, data)

    def stage(self, ref: BlobRef | None, data: bytes | None, delivery: str, pipeline: redis.client.Pipeline) -> str:
        """Write what is to be this blob, if any, for the caller's script to publish; on the broker, as a command of
        the `pipeline`. The broker key to rename to the blob's own; empty where nothing is to be renamed. Raises
        DiskFull."""
        if ref is None or data is None:
            return ""
        if not self.key(ref):
            self.put_file(ref, data)
            return ""
        pipeline.set(keys.staged(delivery), data, ex=keys.STAGED_TTL_S)
        return keys.staged(delivery)

    def put_file(self, ref: BlobRef, data: bytes) -> None:
        """Write a blob of the shared folder, whole or not at all; one on the broker is left to the caller's script.
        Raises DiskFull."""
        if self.key(ref):
            return
        path = self._path(ref)
        unfinished = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.part.blob")
        try:
            with full_disk_told(path), unfinished.open("wb") as out:
                out.write(data)
                out.flush()
                os.fsync(out.fileno())
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)

    def get(self, ref: BlobRef) -> bytes:
        data = self._client.get(self.key(ref)) if self.key(ref) else self._read(self._path(ref))
        if data is None:
            raise BlobMissing(f"blob {ref.ref} is gone: it expired, was dropped, or was never written")
        if len(data) != ref.size or codec.digest(data) != ref.sha256:
            raise BlobCorrupt(
                f"blob {ref.ref} has {len(data)} bytes with sha256 {codec.digest(data)[:16]}..., not the {ref.size} "
                f"bytes with {ref.sha256[:16]}... that were written"
            )
        return data

    def keep_file(self, ref: BlobRef | None) -> bool:
        """Start the life of a blob of the shared folder anew; False when it is gone. One on the broker is left to the
        caller's script."""
        if ref is None or self.key(ref):
            return True
        try:
            os.utime(self._path(ref))
        except FileNotFoundError:
            return False
        return True

    def drop(self, ref: BlobRef | None) -> None:
        if ref is None:
            return
        if self.key(ref):
            self._client.unlink(self.key(ref))
        else:
            self.drop_file(ref)

    def drop_file(self, ref: BlobRef | None) -> None:
        """Remove a blob of the shared folder; one on the broker is left to the caller's transaction, and one in a
        folder that this process does not have to the sweep of those that do."""
        if ref is not None and not self.key(ref) and self._folder is not None:
            self._path(ref).unlink(missing_ok=True)

    @staticmethod
    def key(ref: BlobRef | None) -> str:
        """The broker key of a blob that lies there, or else an empty text."""
        place = ref.ref.removeprefix("redis:") if ref is not None else ""
        return place if place.startswith(keys.blob("")) else ""

    def _path(self, ref: BlobRef) -> Path:
        name = ref.ref.removeprefix("file:")
        if name == ref.ref or name != Path(name).name or not name.endswith(".blob"):
            raise BlobCorrupt(f"{ref.ref!r} is no place for a blob: it must be redis:blob:NAME or file:NAME")
        if self._folder is None:
            raise ConfigError(
                f"blob {ref.ref} lies in a shared folder: set broker.blob_dir to that folder on every machine",
                param="broker.blob_dir",
            )
        return self._folder / name

    @staticmethod
    def _read(path: Path) -> bytes | None:
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None

    def _sweep(self, folder: Path) -> None:
        """Remove files past their life, which the broker does by itself for its keys."""
        for path in folder.glob("*.blob"):
            with contextlib.suppress(FileNotFoundError):  # another process sweeps too
                if time.time() - path.stat().st_mtime > self._ttl_s:
                    path.unlink()
