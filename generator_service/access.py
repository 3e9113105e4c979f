"""Who may ask what: API keys, the routes that are for administrators, and the pages of other sites.

Keys are compared in constant time and never logged, written or quoted; logs and limits know callers by their names.
Knows nothing of limits nor of what the routes do.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from protocol.errors import ConfigError, Forbidden, Unauthorized
from protocol.messages import Name

API_KEY, ADMIN_KEY = "ONTHEFLY_API_KEY", "ONTHEFLY_ADMIN_KEY"
Key = Annotated[str, StringConstraints(pattern=r"^[!-~]([ -~]*[!-~])?$")]  # what a header can carry
USER, ADMIN = "user", "admin"  # names of the callers who have the two keys

OPEN = ("/livez", "/readyz", "/", "/page/")  # probes, and the operators' page, which asks for the key itself
METRICS = "/metrics"
# What only an administrator may do, as method and beginning of the path; pictures of real samples are private data.
# Adapting and tuning are, too: they have the route of other jobs, which asks `require_admin` when it sees one.
ADMINISTRATION = (
    ("POST", "/v1/weights/"),
    ("POST", "/v1/dead-letters/"),
    ("DELETE", "/v1/dead-letters/"),
    ("GET", "/v1/sources/"),
)


class AccessConfig(BaseModel):
    """Keys. Without any, everybody on this machine may do everything; with an admin key, the others are users."""

    model_config = ConfigDict(extra="forbid")

    api_key: Key | None = None  # callers send it as a bearer token; None: $ONTHEFLY_API_KEY
    # for weights, adapting, tuning, dead letters, real samples, others' jobs; None: $ONTHEFLY_ADMIN_KEY, or api_key
    admin_key: Key | None = None
    keys: dict[Name, Key] = {}  # name -> key, of more users, each with limits of their own
    open_metrics: bool = False  # answer GET /metrics without a key
    insecure: bool = False  # answer other machines without a key
    public_url: str | None = Field(default=None, pattern=r"^https?://[^/?#\s]+$")  # of links; None: the socket's own


@dataclass(frozen=True)
class Caller:
    name: str
    admin: bool


ANYONE = Caller("anyone", admin=True)
_caller: ContextVar[Caller] = ContextVar("caller", default=ANYONE)


class Access:
    """The keys of a service, and what each is good for."""

    def __init__(self, config: AccessConfig, environment: Mapping[str, str] = os.environ):
        """An empty variable counts as none. Raises ConfigError: a key is unusable, or two callers have the same."""
        user = config.api_key or _from_environment(environment, API_KEY)
        admin = config.admin_key or _from_environment(environment, ADMIN_KEY)
        named = {USER: user, ADMIN: admin}
        if clash := config.keys.keys() & named.keys():
            raise ConfigError(f"generator.keys: {min(clash)!r} is taken: choose another name", param="generator.keys")
        found = {name: key for name, key in {**named, **config.keys}.items() if key is not None}
        if len(set(found.values())) < len(found):
            raise ConfigError(
                f"two callers have the same key ({', '.join(sorted(found))}): give each its own", param="generator.keys"
            )
        admins = {ADMIN} if admin is not None else {USER}
        self._digests = [(Caller(name, name in admins), _digest(key)) for name, key in found.items()]
        self._config = config
        self.has_user_keys = bool(found.keys() - {ADMIN})

    def check_address(self, host: str) -> None:
        """Raises ConfigError for an address that other machines reach, when there is no key to keep them out."""
        if not (self.has_user_keys or self._config.insecure or _is_loopback(host)):
            raise ConfigError(
                f"other machines reach generator.host = {host!r}, and there is no key: set {API_KEY}, or say "
                "generator.insecure = true to serve everybody",
                param="generator.host",
            )

    def caller(self, method: str, path: str, headers: Mapping[str, str]) -> Caller:
        """Who asks, and may.

        Raises:
            Unauthorized: a key is needed, and the one sent is nobody's.
            Forbidden: an administrator's route, or a page of another website that asks in its reader's name.
        """
        if self.is_open(path):
            return ANYONE
        caller = self._identified(headers.get("authorization"))
        if caller is None:
            raise Unauthorized("this service asks for a key: send Authorization: Bearer <key>")
        if caller.name == ANYONE.name:
            self._check_origin(method, headers)
        if any(method == verb and path.startswith(beginning) for verb, beginning in ADMINISTRATION):
            _check_admin(caller)
        return caller

    def is_open(self, path: str) -> bool:
        """Whether it is answered without a key."""
        return path in OPEN or path.startswith("/page/") or (path == METRICS and self._config.open_metrics)

    def _identified(self, header: str | None) -> Caller | None:
        """The owner of the key in an Authorization header; None: there is none."""
        scheme, _, key = (header or "").partition(" ")
        given = _digest(key.strip() if scheme.lower() == "bearer" else "")
        owners = [caller for caller, digest in self._digests if hmac.compare_digest(given, digest)]  # all compared
        if owners:
            return owners[0]
        return None if self.has_user_keys else Caller(ANYONE.name, admin=not self._digests)

    def _check_origin(self, method: str, headers: Mapping[str, str]) -> None:
        """Without a key, nothing but a browser's own headers tells the machine's user from the websites they visit."""
        if method not in ("GET", "HEAD") and headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            raise Forbidden("a page of another website sent this: set a key, and send it")
        host = _hostname(f"//{headers.get('host', '')}")
        known = ("", "localhost", _hostname(self._config.public_url or ""))
        if not (self._config.insecure or _is_address(host) or host in known):
            raise Forbidden(
                f"without a key this service answers to its address or to localhost, not to {host[:100]!r}: set a key, "
                "or generator.public_url"
            )


@contextmanager
def acting(caller: Caller) -> Iterator[None]:
    """The requests served within the block, in this task and the threads that it asks, are this caller's."""
    token = _caller.set(caller)
    try:
        yield
    finally:
        _caller.reset(token)


def current() -> Caller:
    """Whose request is being served."""
    return _caller.get()


def require_admin() -> None:
    """Raises Forbidden unless an administrator asks."""
    _check_admin(_caller.get())


def _check_admin(caller: Caller) -> None:
    if not caller.admin:
        raise Forbidden(f"this is for administrators: send the service's admin key ({ADMIN_KEY})")


def _from_environment(environment: Mapping[str, str], name: str) -> str | None:
    if not environment.get(name):
        return None
    try:
        return TypeAdapter(Key).validate_python(environment[name])
    except ValidationError:
        raise ConfigError(
            f"{name} has characters that are not printable ASCII, or spaces around it: choose another key", param=name
        ) from None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _hostname(url: str) -> str:
    """ "" when it has none, "?" when it does not parse."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return "?"


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)
