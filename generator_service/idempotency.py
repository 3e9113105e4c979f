"""Replies by idempotency key, in bounded memory. Knows nothing of HTTP beyond status, headers and body."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from protocol.errors import IdempotencyConflict


@dataclass(frozen=True)
class Reply:
    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes

    @property
    def final(self) -> bool:
        """Whether asking again would give the same; not when the service was full or failed."""
        return self.status < 500 and self.status != 429


@dataclass(frozen=True)
class _Entry:
    fingerprint: bytes
    task: asyncio.Task[Reply]

    @property
    def size(self) -> int:
        return len(self.task.result().body) if self.task.done() else 0


class IdempotencyStore:
    """Runs each key once. Used from one event loop."""

    def __init__(self, max_bytes: int = 64 * 2**20, max_replies: int = 10_000):
        """
        Args:
            max_bytes: of reply bodies kept; the oldest go first.
            max_replies: replies kept.
        """
        self._max_bytes, self._max_replies = max_bytes, max_replies
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._bytes = 0

    async def reply(self, key: str, request: bytes, run: Callable[[], Awaitable[Reply]]) -> Reply:
        """The reply to `request`: stored, that of the same request now in flight, or what `run` gives.

        Raises IdempotencyConflict when the key came with another request.
        """
        fingerprint = hashlib.sha256(request).digest()
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = _Entry(fingerprint, asyncio.ensure_future(run()))
            entry.task.add_done_callback(lambda task: self._done(key, task))
        elif entry.fingerprint != fingerprint:
            raise IdempotencyConflict(
                "this Idempotency-Key came with another request before: use a new key for a new request",
                param="Idempotency-Key",
            )
        return await asyncio.shield(entry.task)

    def _done(self, key: str, task: asyncio.Task[Reply]) -> None:
        if task.cancelled() or task.exception() is not None or not task.result().final:
            del self._entries[key]
            return
        self._bytes += len(task.result().body)
        finished = [key for key, entry in self._entries.items() if entry.task.done()]
        for oldest in finished:
            if self._bytes <= self._max_bytes and len(self._entries) <= self._max_replies:
                break
            self._bytes -= self._entries.pop(oldest).size
