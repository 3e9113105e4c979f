"""What every HTTP request passes before its route: measuring, the API key, the body limit, idempotency keys.

Plain ASGI, so that a handler still sees its client disconnect. Knows nothing of what the routes do.
"""

from __future__ import annotations

import asyncio
import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from generator_service.idempotency import IdempotencyStore, Reply
from generator_service.problems import problem_response
from generator_service.telemetry import Telemetry
from protocol.errors import BodyTooLarge, InvalidRequest, OnTheFlyError, Unauthorized

OPEN_PATHS = ("/livez", "/readyz")
MAX_DRAIN = 8  # a refused body is read on to this many times the limit, so that its sender reads the reply
MAX_KEY = 255

METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}


class Measured:
    """Counts every reply by method, route template and status."""

    def __init__(self, app: ASGIApp, telemetry: Telemetry):
        self._app, self._telemetry = app, telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "other")
                method = scope["method"] if scope["method"] in METHODS else "other"  # anybody may invent one
                self._telemetry.request_done(method, route, message["status"])
            await send(message)

        await self._app(scope, receive, counted)


class Authorized:
    """Asks for `Authorization: Bearer {key}`, except where a prober looks."""

    def __init__(self, app: ASGIApp, api_key: str | None):
        self._app = app
        self._expected = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._expected is not None and scope["path"] not in OPEN_PATHS:
            given = Headers(scope=scope).get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, self._expected):
                refused = Unauthorized("this service asks for a key: send Authorization: Bearer <key>")
                return await problem_response(refused)(scope, receive, send)
        await self._app(scope, receive, send)


class Bounded:
    """Reads request bodies up to a limit, by Content-Length and while they arrive."""

    def __init__(self, app: ASGIApp, max_body_bytes: int):
        self._app, self._limit = app, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            return await self._app(scope, receive, send)
        try:
            body = await self._read(Headers(scope=scope).get("content-length", "0"), receive)
        except OnTheFlyError as error:
            return await problem_response(error, {"Connection": "close"})(scope, receive, send)
        if body is not None:
            await self._app(scope, _replay(body, receive), send)

    async def _read(self, content_length: str, receive: Receive) -> bytes | None:
        """The whole body; None when the client went away."""
        if not content_length.isdecimal():
            raise InvalidRequest("Content-Length must be a number", param="Content-Length")
        too_large = BodyTooLarge(
            f"the body is larger than {self._limit} bytes: send less, or raise generator.max_body_bytes"
        )
        if int(content_length) > MAX_DRAIN * self._limit:
            raise too_large
        chunks, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunk = message.get("body", b"")
            size, more = size + len(chunk), message.get("more_body", False)
            if size > MAX_DRAIN * self._limit:
                raise too_large
            if size <= self._limit:
                chunks.append(chunk)
        if size > self._limit:
            raise too_large
        return b"".join(chunks)


class Idempotent:
    """Gives a POST with an `Idempotency-Key` one effect: the same key and body get the same stored reply.

    Such a request outlives its client: when the connection breaks it runs on, and asking again gets its reply.
    """

    def __init__(self, app: ASGIApp, store: IdempotencyStore):
        self._app, self._store = app, store

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        key = Headers(scope=scope).get("idempotency-key") if scope["type"] == "http" else None
        if key is None or scope["method"] != "POST":
            return await self._app(scope, receive, send)
        if not 0 < len(key) <= MAX_KEY:
            refused = InvalidRequest(f"Idempotency-Key must have 1 to {MAX_KEY} characters", param="Idempotency-Key")
            return await problem_response(refused)(scope, receive, send)
        body = (await receive()).get("body", b"")

        async def run() -> Reply:
            return await _capture(self._app, scope, body)

        request = b"\0".join((scope["path"].encode(), scope["query_string"], body))
        try:
            reply = await self._store.reply(key, request, run)
        except OnTheFlyError as error:
            return await problem_response(error)(scope, receive, send)
        await send({"type": "http.response.start", "status": reply.status, "headers": reply.headers})
        await send({"type": "http.response.body", "body": reply.body})


async def _capture(app: ASGIApp, scope: Scope, body: bytes) -> Reply:
    """The app's whole reply to a body."""
    parts: list[Message] = []

    async def keep(message: Message) -> None:
        parts.append(message)

    await app(scope, _replay(body, _never), keep)
    start, *rest = parts
    return Reply(start["status"], list(start["headers"]), b"".join(part.get("body", b"") for part in rest))


def _replay(body: bytes, then: Receive) -> Receive:
    """A receive that gives the body in one piece, and after it what `then` gives."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        return messages.pop() if messages else await then()

    return receive


async def _never() -> Message:
    return await asyncio.Event().wait()  # type: ignore[return-value]  # cancelled with the request
