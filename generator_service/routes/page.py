"""The operators' page: static files, which ask the other routes for everything that they show.

They hold nothing secret, so they are served without a key; the page asks for it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources
from typing import Annotated

from fastapi import APIRouter, Header, Response

from generator_service.service import Service
from protocol.errors import NotFound

INDEX = "index.html"
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
HEADERS = {
    "Cache-Control": "no-cache",  # to be kept, and asked about each time: names do not change with their content
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@dataclass(frozen=True)
class File:
    data: bytes
    media_type: str
    etag: str


def router(service: Service) -> APIRouter:
    routes = APIRouter(include_in_schema=False)
    files = _read()

    def send(name: str, known: str | None) -> Response:
        if name not in files:
            raise NotFound(f"the page has no file {name[:100]!r}")
        file = files[name]
        headers = HEADERS | {"ETag": file.etag}
        if known is not None and file.etag in known:
            return Response(status_code=304, headers=headers)
        return Response(file.data, media_type=file.media_type, headers=headers)

    @routes.get("/")
    async def index(if_none_match: Annotated[str | None, Header()] = None) -> Response:
        return send(INDEX, if_none_match)

    @routes.get("/page/{name}")
    async def part(name: str, if_none_match: Annotated[str | None, Header()] = None) -> Response:
        return send(name, if_none_match)

    return routes


def _read() -> dict[str, File]:
    """Every file of the page, by name."""
    found = {}
    for entry in resources.files("generator_service").joinpath("page").iterdir():
        suffix = "." + entry.name.rpartition(".")[2]
        if suffix in MEDIA_TYPES:
            data = entry.read_bytes()
            found[entry.name] = File(data, MEDIA_TYPES[suffix], f'"{hashlib.sha256(data).hexdigest()[:32]}"')
    return found
