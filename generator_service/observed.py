"""What is seen of every HTTP request from outside: its id, how long it took, a log line, a span; and its reply when it
fails for a reason that nobody foresaw.

Plain ASGI, around everything else. Knows nothing of what requests ask for; bodies and headers are not logged.
"""

from __future__ import annotations

import logging
import re
import secrets
from http import HTTPStatus
from time import perf_counter

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from generator_service.problems import problem_response
from generator_service.telemetry import Telemetry
from protocol import logs, tracing
from protocol.errors import GenerationFailed

log = logging.getLogger(__name__)
access = logging.getLogger("access")

HEADER = b"x-request-id"
SANE = re.compile(rb"[A-Za-z0-9._-]{1,128}")  # an id that is taken from a caller
METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
PROBES = {"/livez", "/readyz", "/metrics"}  # asked every few seconds: no log lines
GONE = 499  # counted when a client went away before it had a reply; it never gets this


class Observed:
    """Gives each request an id, counts and times its reply by method and route template, and logs it."""

    def __init__(self, app: ASGIApp, telemetry: Telemetry):
        self._app, self._telemetry = app, telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = dict(scope["headers"])
        sane = SANE.fullmatch(given.get(HEADER, b""))
        request_id = sane[0] if sane else secrets.token_hex(8).encode()
        parent = given.get(b"traceparent", b"").decode("latin-1") or None
        began, status = perf_counter(), GONE

        async def told(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (HEADER, request_id)]
                self._telemetry.request_done(_method(scope), _route(scope), status)  # a stream may be long
            await send(message)

        with logs.fields(request_id=request_id.decode()), tracing.span("request", parent=parent, kind="server"):
            try:
                await self._app(scope, receive, told)
            except Exception:
                log.exception("a request failed")
                if status != GONE:  # too late for another reply: the server breaks the connection
                    raise
                failed = GenerationFailed("the service failed; its log says why")
                await problem_response(failed)(scope, receive, told)
            finally:
                self._ended(scope, status, perf_counter() - began)

    def _ended(self, scope: Scope, status: int, seconds: float) -> None:
        method, route = _method(scope), _route(scope)
        self._telemetry.request_took(method, route, seconds)
        if status == GONE:
            self._telemetry.request_done(method, route, status)
        if route not in PROBES or status == HTTPStatus.INTERNAL_SERVER_ERROR:
            took = {"method": method, "route": route, "status": status, "ms": round(1000 * seconds, 1)}
            access.info("%s %s %d", method, route, status, extra=took | {"caller": scope.get("caller")})
        tracing.describe(f"{method} {route}", **{"http.response.status_code": status})


def _method(scope: Scope) -> str:
    return scope["method"] if scope["method"] in METHODS else "other"  # anybody may invent one


def _route(scope: Scope) -> str:
    """Its template; "other" for a path that has none, or that did not get so far."""
    return getattr(scope.get("route"), "path", "other")
