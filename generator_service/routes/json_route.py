"""Routes whose JSON bodies are parsed in a thread, so that a large one does not hold up the event loop.

The parser does not let go of the interpreter while it works, so what it gets is bounded: see `limits.check_values`.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import pydantic_core
from fastapi import Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.routing import APIRoute

from generator_service.limits import check_values
from protocol.errors import InvalidRequest

SMALL = 2**16  # bytes that are parsed at once: a thread would take longer


class JsonRoute(APIRoute):
    """For `APIRouter(route_class=...)`. Raises InvalidRequest and BodyTooLarge before the handler is asked."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def parsed(request: Request) -> Response:
            body = await request.body()
            if not body or "json" not in request.headers.get("content-type", "").lower():
                return await handler(request)
            limit = request.app.state.body_values
            value = _parse(body, limit) if len(body) <= SMALL else await run_in_threadpool(_parse, body, limit)
            return await handler(_Parsed(request, body, value))

        return parsed


class _Parsed(Request):
    def __init__(self, request: Request, body: bytes, value: Any):
        super().__init__(request.scope, request.receive)
        self._raw, self._value = body, value

    async def body(self) -> bytes:
        return self._raw

    async def json(self) -> Any:
        return self._value


def _parse(body: bytes, limit: int) -> Any:
    check_values(body, limit)
    try:
        return pydantic_core.from_json(body)
    except ValueError as error:
        raise InvalidRequest(f"the body is not JSON ({error}): send one JSON object", param="body") from error
