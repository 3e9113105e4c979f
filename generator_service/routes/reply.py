"""A message as the body of a reply."""

from __future__ import annotations

from fastapi import Response

from protocol.messages import Message


def reply(body: Message, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A message as JSON, serialised once."""
    return Response(body.model_dump_json(), status, headers, media_type="application/json")
