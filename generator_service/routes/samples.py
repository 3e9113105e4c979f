"""Samples and where they came from."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import APIRouter, Header, Response

from generator_service.service import Service
from protocol.entries import Sample

CONTENT: dict[str, dict] = {"image/webp": {}, "image/gif": {}, "video/mp4": {}}
CLIP = {200: {"description": "The clip's file", "content": CONTENT}, 206: {"description": "The part asked for"}}


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.get("/v1/samples/{sample_id}")
    def sample(sample_id: str) -> Sample:
        """Where a synthetic sample came from."""
        return service.samples.get(sample_id)

    @routes.get("/v1/samples/{sample_id}/image", response_class=Response)
    def image(sample_id: str) -> Response:
        """Its pixels, if it was made for a request here."""
        data, media_type = service.samples.image(sample_id)
        return Response(data, media_type=media_type)

    @routes.get("/v1/samples/{sample_id}/video", response_class=Response, responses=CLIP)
    def video(sample_id: str, range: Annotated[str | None, Header()] = None) -> Response:
        """The file of a clip, if it was made for a request here: an animated WebP or GIF, or MP4. `Range` with one
        range of bytes gives that part, for players that seek; another one is ignored."""
        data, media_type = service.samples.clip(sample_id)
        return _part(data, media_type, range)

    return routes


def _part(data: bytes, media_type: str, wanted: str | None) -> Response:
    """What a Range header asks for (RFC 9110, 14), or everything."""
    headers = {"Accept-Ranges": "bytes"}
    found = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", wanted or "")
    first, last = found.groups() if found else ("", "")
    if first:
        start, end = int(first), min(int(last or len(data)), len(data) - 1)
    else:
        start, end = max(0, len(data) - int(last or 0)), len(data) - 1
    if not (first or last) or start > end:
        return Response(data, media_type=media_type, headers=headers)
    headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
    return Response(data[start : end + 1], 206, headers, media_type)
