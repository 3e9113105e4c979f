"""What both clients set up in the HTTP library, when they turn to another replica, and when they ask again."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import httpx

from protocol import client_calls as calls
from protocol.client_calls import Call
from protocol.errors import ConfigError, NotReady, NotTheService, Retryable, ServiceUnreachable
from protocol.messages import Job, Message

Answer = TypeVar("Answer", bound=Message | bytes)

TIMEOUT_S = 300.0  # for one answer: an image request waits for its turn on the GPU
DEADLINE_S = 900.0  # for a call, all its attempts and the pauses between them
RETRIES = 3
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 8.0
_CONNECT_S = 5.0
_LOOPBACK = {"127.0.0.1", "localhost", "::1"}


def options(url: str, api_key: str | None, timeout: float) -> dict[str, Any]:
    """Settings of an httpx client. Proxies of the environment are for other machines, not for this one.

    Raises:
        ConfigError: the URL does not parse, or the key is none.
    """
    try:
        host = httpx.URL(url).host
    except (httpx.InvalidURL, UnicodeError):
        raise calls.bad_address(url) from None  # the cause may quote a password
    return {
        "base_url": url,
        "headers": calls.default_headers(api_key),
        "timeout": httpx.Timeout(timeout, connect=min(_CONNECT_S, timeout)),
        "trust_env": host not in _LOOPBACK,
    }


class Replicas:
    """The addresses of a service's replicas, and which of them is asked first: the one that answered last."""

    def __init__(self, addresses: str | Sequence[str]):
        """Raises ConfigError: an address is not an http:// or https:// URL, or there is none."""
        self.urls = [calls.base_url(url) for url in ([addresses] if isinstance(addresses, str) else addresses)]
        self.first = 0  # index into `urls`
        self._homes: dict[str, int] = {}  # job id -> index of the replica that has it
        if not self.urls:
            raise ConfigError("the service has no address: write http://host:port")

    def order(self, job_id: str | None = None) -> list[int]:
        """Indices in the order in which they are to be asked; about a job, only the replica that has it."""
        if job_id in self._homes:
            return [self._homes[job_id]]
        return [(self.first + step) % len(self.urls) for step in range(len(self.urls))]

    def answered(self, index: int, answer: Message | None) -> None:
        """Remember who has a job."""
        if isinstance(answer, Job):
            self._homes[answer.id] = index


def may_go_elsewhere(call: Call[Any], error: Retryable) -> bool:
    """Whether another replica may be asked: this one did not begin with it, or it may be done twice."""
    return isinstance(error, NotReady) or _not_connected(error) or call.repeatable


def _not_connected(error: Retryable) -> bool:
    return isinstance(error.__cause__, httpx.ConnectError | httpx.ConnectTimeout)


class Attempts(Generic[Answer]):
    """One call and when it is made again: after a failure that may pass, later and later, at random, so that clients
    that failed together do not come back together."""

    def __init__(self, call: Call[Answer], retries: int, deadline_s: float):
        """`retries`: attempts after the first one; `deadline_s`: seconds for everything."""
        self.call = call.keyed() if retries else call
        self._left, self.until, self._pause = retries, time.monotonic() + deadline_s, _FIRST_PAUSE_S

    def timeout(self, usual: httpx.Timeout) -> httpx.Timeout:
        """Of the next attempt: no longer than there is time."""
        left = max(0.001, self.until - time.monotonic())
        return httpx.Timeout(min(usual.read or left, left), connect=min(usual.connect or left, left))

    def delay(self, error: Retryable) -> float:
        """Seconds until the next attempt; at least what the service asked for. Raises `error` when there is to be
        none."""
        pause = self._pause * (0.5 + secrets.randbelow(1000) / 2000)
        if not isinstance(error.__cause__, httpx.RequestError):
            pause = max(pause, error.retry_after or 0.0)
        if not self._left or not self._may_repeat(error) or time.monotonic() + pause >= self.until:
            raise error
        self._left, self._pause = self._left - 1, min(2 * self._pause, _LONGEST_PAUSE_S)
        return pause

    def _may_repeat(self, error: Retryable) -> bool:
        """A DELETE has no idempotency key: it is repeated only when the service did not do it."""
        if isinstance(error, NotTheService):
            return False
        refused = _not_connected(error) or not isinstance(error, ServiceUnreachable)
        return refused or self.call.method != "DELETE"


def events_timeout(timeout: httpx.Timeout) -> httpx.Timeout:
    return httpx.Timeout(calls.EVENT_READ_S, connect=timeout.connect)
