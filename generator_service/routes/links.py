"""The address that links in replies begin with."""

from __future__ import annotations

from fastapi import Request


def base_url(request: Request, public_url: str | None) -> str:
    """`public_url`, or else the address of the socket that the request came in at. Never the request's Host header:
    whoever sends it could put another site's name into a reply that others read."""
    if public_url is not None:
        return public_url
    server = request.scope.get("server")
    if server is None or server[1] is None:
        return ""  # a Unix socket: links are relative
    host, port = server
    return f"{request.scope['scheme']}://{f'[{host}]' if ':' in host else host}:{port}"
