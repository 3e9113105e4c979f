"""Calls that send a file: what is asked, and the file piece by piece, so that it is never in memory whole."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from protocol.client_calls import Call
from protocol.errors import BadFile
from protocol.published import PublishedModel, PublishedModelList

PIECE = 2**20  # bytes


def publish_model(name: str, model: bytes | str | Path, idempotency_key: str | None) -> Call[PublishedModel]:
    """`model`: safetensors, or the path of such a file. Raises BadFile: it cannot be read."""
    content = Path(model) if isinstance(model, str) else model
    try:
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
    except OSError as error:
        raise BadFile(f"{content} cannot be read ({error.strerror}): name a file that is there") from error
    headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
    if idempotency_key is not None:
        headers["Idempotency-Key"] = idempotency_key
    path = f"/v1/published-models/{quote(name, safe='')}"
    return Call("POST", path, PublishedModel, headers=headers, content=content)


def published_models() -> Call[PublishedModelList]:
    return Call("GET", "/v1/published-models", PublishedModelList)


def sent(call: Call[Any], until: float) -> dict[str, Any]:
    """The body of a call, as httpx.Client takes it. `until`: monotonic time after which nothing more is sent."""
    return {"json": call.body} if call.content is None else {"content": _pieces(call.content, until)}


def sent_async(call: Call[Any], until: float) -> dict[str, Any]:
    """The same, as httpx.AsyncClient takes it."""
    return {"json": call.body} if call.content is None else {"content": _pieces_async(call.content, until)}


def _pieces(content: bytes | Path, until: float) -> Iterator[bytes]:
    if isinstance(content, bytes):
        for start in range(0, len(content), PIECE):
            _check_time(until)
            yield content[start : start + PIECE]
        return
    with content.open("rb") as file:
        while piece := file.read(PIECE):
            _check_time(until)
            yield piece


async def _pieces_async(content: bytes | Path, until: float) -> AsyncIterator[bytes]:
    pieces = _pieces(content, until)
    while (piece := await asyncio.to_thread(next, pieces, b"")) != b"":
        yield piece


def _check_time(until: float) -> None:
    if time.monotonic() > until:
        raise httpx.WriteTimeout("it took too long to send")
