"""Request bodies that are too large for the memory: they go to a file while they arrive.

Their route finds the file as `scope["upload"]`, and may move it away. In the place of the body stands its sha256, so
that two requests with the same key can be compared. Knows nothing of what the files are.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.types import Scope

from protocol.disk import full_disk_told
from protocol.errors import Overloaded

ROUTE = "/v1/published-models/"
AT_ONCE = 4  # uploads of a replica
PIECE = 2**20  # bytes written at a time
FORGOTTEN_S = 86_400.0  # a file that is older was left by a process that was killed


class Upload:
    """One body on its way to a file."""

    def __init__(self, path: Path, file: FileIO):
        self.path = path
        self._file, self._hash, self._waiting = file, hashlib.sha256(), bytearray()

    async def take(self, chunk: bytes) -> None:
        """Raises DiskFull."""
        self._waiting += chunk
        if len(self._waiting) >= PIECE:
            await run_in_threadpool(self._write)

    async def end(self) -> bytes:
        """What stands for the body: its sha256, in hexadecimal. Raises DiskFull."""
        await run_in_threadpool(self._write)
        return self._hash.hexdigest().encode()

    def _write(self) -> None:
        data = bytes(self._waiting)
        self._waiting.clear()
        self._hash.update(data)
        written = 0
        with full_disk_told(self.path):
            while written < len(data):
                written += self._file.write(data[written:])


class Uploads:
    """Which requests bring such bodies, and room for them. Used from one event loop."""

    def __init__(self, folder: Path, max_bytes: int):
        """
        Args:
            folder: created when it is first wanted; replicas may share it.
            max_bytes: of one body.
        """
        self._folder, self.max_bytes, self._open = folder, max_bytes, 0

    def wants(self, scope: Scope) -> bool:
        """Whether the body of a request goes to a file."""
        return scope["method"] == "POST" and scope["path"].startswith(ROUTE)

    @contextmanager
    def one(self) -> Iterator[Upload]:
        """An empty file, removed at the end unless it was moved away. Raises Overloaded and DiskFull."""
        if self._open >= AT_ONCE:
            raise Overloaded("too many uploads at a time: try again in a moment", retry_after=2.0)
        self._open += 1
        path = self._folder / f"{secrets.token_hex(8)}.upload"
        try:
            with full_disk_told(path):
                self._folder.mkdir(parents=True, exist_ok=True)
                self._forget()
                file = path.open("xb", buffering=0)
            with file:
                yield Upload(path, file)
        finally:
            self._open -= 1
            path.unlink(missing_ok=True)

    def _forget(self) -> None:
        for path in self._folder.glob("*.upload"):
            if path.exists() and time.time() - os.stat(path).st_mtime > FORGOTTEN_S:
                path.unlink(missing_ok=True)
