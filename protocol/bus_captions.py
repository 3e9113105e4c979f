"""Versions of captions that all replicas use, so that a work unit made twice, on any of them, has the same prompts.

They run out by themselves. Knows nothing of how versions are made, nor of what their names stand for. Every method
raises BrokerUnavailable when the broker does not answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import redis
from pydantic import ValidationError

from protocol import keys
from protocol.broker import broker_errors
from protocol.entries import Versions


class CaptionStore:
    """What was made of captions, by names that the replicas agree on. May be shared by threads."""

    def __init__(self, client: redis.Redis, url: str):
        self._client, self._url = client, url

    def get(self, names: Sequence[str]) -> list[Versions | None]:
        """What there is under each name; None: nothing, or not any more."""
        with broker_errors(self._url):
            bodies = self._client.mget([keys.versions(name) for name in names]) if names else []
        return [_read(body) for body in bodies]

    def put(self, name: str, versions: Versions, ttl_s: int) -> Versions:
        """Keep these for so many seconds, unless somebody was first. Returns the first one's. Raises BrokerFull."""
        with broker_errors(self._url):
            before = self._client.set(keys.versions(name), versions.model_dump_json(), nx=True, get=True, ex=ttl_s)
        return _read(before) or versions


def _read(body: bytes | None) -> Versions | None:
    """None also for what a process of another version wrote and this one cannot read."""
    try:
        return None if body is None else Versions.model_validate_json(body)
    except ValidationError:
        return None
