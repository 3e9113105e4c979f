"""What every HTTP request passes before its route: the API key, its owner's rate, the body limits, idempotency keys.

Plain ASGI, so that a handler still sees its client disconnect. Knows nothing of what the routes do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from generator_service import access
from generator_service.access import Access
from generator_service.idempotency import IdempotencyStore, Reply
from generator_service.limits import Bodies, RateLimit
from generator_service.problems import problem_response
from generator_service.uploads import Upload, Uploads
from protocol import logs
from protocol.errors import BodyTooLarge, BodyTooSlow, InvalidRequest, OnTheFlyError, Overloaded

FEEDBACK = "/v1/feedback"
MAX_DRAIN = 8  # a refused body is read on to this many times the limit, so that its sender reads the reply
MAX_KEY = 255


class Authorized:
    """Finds out who asks, and whether they may, and how often."""

    def __init__(self, app: ASGIApp, access: Access, rate: RateLimit):
        self._app, self._access, self._rate = app, access, rate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        try:
            caller = self._access.caller(scope["method"], scope["path"], Headers(scope=scope))
            if not self._access.is_open(scope["path"]):
                self._rate.take(caller.name)
        except OnTheFlyError as error:
            return await problem_response(error)(scope, receive, send)
        scope["caller"] = caller.name  # for the line in the log, which is written outside
        with access.acting(caller), logs.fields(caller=caller.name):
            await self._app(scope, receive, send)


class Bounded:
    """Reads request bodies up to a limit, by Content-Length and while they arrive, in a limited time; the largest of
    them to the disk."""

    def __init__(
        self,
        app: ASGIApp,
        max_body_bytes: int,
        max_feedback_bytes: int,
        body_s: float,
        bodies: Bodies,
        uploads: Uploads,
    ):
        """`max_feedback_bytes`: of feedback, which may bring many images; `max_body_bytes`: of all others that
        `uploads` does not want."""
        self._app, self._body_s, self._bodies, self._uploads = app, body_s, bodies, uploads
        self._max_body_bytes, self._max_feedback_bytes = max_body_bytes, max_feedback_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            return await self._app(scope, receive, send)
        with ExitStack() as stack:
            try:
                if self._uploads.wants(scope):
                    kept: Upload | _InMemory = stack.enter_context(self._uploads.one())
                    scope["upload"] = kept.path
                else:
                    kept = _InMemory(stack.enter_context(self._bodies.one()))
                async with asyncio.timeout(self._body_s):
                    body = await self._read(scope, receive, kept)
            except TimeoutError:
                slow = BodyTooSlow(f"the body did not arrive within {self._body_s:g} s: send it at once")
                return await problem_response(slow, {"Connection": "close"})(scope, receive, send)
            except OnTheFlyError as error:
                return await problem_response(error, {"Connection": "close"})(scope, receive, send)
            if body is not None:
                await self._app(scope, _replay(body, receive), send)

    def _limit(self, scope: Scope) -> tuple[int, str]:
        """Bytes, and the setting that says so."""
        if self._uploads.wants(scope):
            return self._uploads.max_bytes, "max_model_bytes"
        if scope["path"] == FEEDBACK:
            return self._max_feedback_bytes, "max_feedback_bytes"
        return self._max_body_bytes, "max_body_bytes"

    async def _read(self, scope: Scope, receive: Receive, kept: Upload | _InMemory) -> bytes | None:
        """The whole body, or what stands for it; None when the client went away."""
        limit, setting = self._limit(scope)
        content_length = Headers(scope=scope).get("content-length", "0")
        if not content_length.isdecimal():
            raise InvalidRequest("Content-Length must be a number", param="Content-Length")
        too_large = BodyTooLarge(f"the body is larger than {limit} bytes: send less, or raise generator.{setting}")
        if int(content_length) > MAX_DRAIN * limit:
            raise too_large
        size, more, refused = 0, True, None
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunk = message.get("body", b"")
            size, more = size + len(chunk), message.get("more_body", False)
            if size > MAX_DRAIN * limit:
                raise too_large
            if size > limit:
                refused = too_large
            elif refused is None:
                try:
                    await kept.take(chunk)
                except OnTheFlyError as error:
                    refused = error
        if refused is not None:
            raise refused
        return await kept.end()


class _InMemory:
    """A body that is kept as it is. `room`: as of `Bodies.one`."""

    def __init__(self, room: Callable[[int], bool]):
        self._room, self._chunks = room, list[bytes]()

    async def take(self, chunk: bytes) -> None:
        if not self._room(len(chunk)):
            raise Overloaded("too many large requests at a time: try again in a moment")
        self._chunks.append(chunk)

    async def end(self) -> bytes:
        return b"".join(self._chunks)


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
            reply = await self._store.reply(f"{access.current().name}\0{key}", request, run)
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
