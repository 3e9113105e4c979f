"""Every error of the HTTP side as application/problem+json, built from the error tree of `protocol.errors`."""

from __future__ import annotations

import math
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from protocol import logs
from protocol.errors import InvalidRequest, NotFound, OnTheFlyError

MEDIA_TYPE = "application/problem+json"
SHOWN_ERRORS = 5
SHOWN_CHARACTERS = 300  # of a field's name or a message, either of which may quote the input


def problem_response(error: OnTheFlyError, headers: dict[str, str] | None = None) -> JSONResponse:
    """The reply to a request that ended in `error`; Retry-After in whole seconds where the error has one."""
    headers = dict(headers or {})
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if error.status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    return _response(error.to_problem(), error.status, headers)


def install(app: FastAPI) -> None:
    """Register the handlers."""
    app.add_exception_handler(OnTheFlyError, _ours)
    app.add_exception_handler(RequestValidationError, _validation)
    app.add_exception_handler(HTTPException, _framework)


async def _ours(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, OnTheFlyError)
    return problem_response(error)


async def _validation(request: Request, error: Exception) -> JSONResponse:
    """422 naming the fields; malformed JSON is one of these. Quotes little of the input, which may be large."""
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    if found[0]["type"] == "model_attributes_type" and not _is_json(request):
        return problem_response(InvalidRequest("the body is not JSON: send Content-Type: application/json"))
    lines = [f"{_path(entry)}: {_short(entry['msg'])}" for entry in found[:SHOWN_ERRORS]]
    more = f"; and {len(found) - SHOWN_ERRORS} more" if len(found) > SHOWN_ERRORS else ""
    return problem_response(InvalidRequest("; ".join(lines) + more, param=_path(found[0])))


def _path(entry: dict[str, Any]) -> str:
    """Where in the body: "samples.3.label"."""
    inner = [str(part) for part in entry["loc"] if part not in ("body", "path", "query", "header")]
    if len(inner) > 1 and inner[-1] in ("int", "str"):
        inner.pop()  # which of a field's types it was compared with
    return _short(".".join(inner)) or "body"


def _short(text: str) -> str:
    """Of a text that may quote the input, so much that a reader recognises it."""
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def _is_json(request: Request) -> bool:
    return "json" in request.headers.get("content-type", "")


async def _framework(request: Request, error: Exception) -> JSONResponse:
    """404 for a route, 405, and what else the framework refuses."""
    assert isinstance(error, HTTPException)
    if error.status_code == HTTPStatus.NOT_FOUND:
        return problem_response(NotFound(f"no route {request.url.path}: see /docs"))
    if error.status_code == HTTPStatus.BAD_REQUEST:
        return problem_response(InvalidRequest(f"{error.detail}: send one JSON object"))
    refused = InvalidRequest(f"{error.detail}: {request.method} {request.url.path}; see /docs")
    problem = refused.to_problem() | {
        "status": error.status_code,
        "title": HTTPStatus(error.status_code).phrase.lower(),
    }
    headers = dict(error.headers or {})
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        headers |= _allowed(request)
    return _response(problem, error.status_code, headers)


def _allowed(request: Request) -> dict[str, str]:
    """Every method of the path: the framework knows those of its first route only."""
    path = getattr(request.scope.get("route"), "path", None)
    methods = request.app.openapi()["paths"].get(path, {})
    return {"Allow": ", ".join(sorted(method.upper() for method in methods))} if methods else {}


def _response(problem: dict[str, Any], status: int, headers: dict[str, str]) -> JSONResponse:
    """A problem document that tells the request's id, by which the log has it."""
    told = {"request_id": logs.current()["request_id"]} if "request_id" in logs.current() else {}
    return JSONResponse(problem | told, status, headers, media_type=MEDIA_TYPE)
