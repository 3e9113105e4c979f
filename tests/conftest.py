"""Brokers for every test that needs one. Real servers: no test runs on an imitation of one."""

from __future__ import annotations

import logging
import os
import shutil
import signal
from collections.abc import Iterator

import hypothesis
import pytest

from protocol.broker import EmbeddedBroker, connect
from protocol.logs import JsonLines

# Models here are tiny, and several processes share the cores: spinning threads only get in each other's way.
os.environ["OMP_NUM_THREADS"] = "1"
# A shell that starts the tests in the background has them ignore Ctrl-C, and their children too; some test just that.
signal.signal(signal.SIGINT, signal.default_int_handler)
SERVERS = ("embedded", "redis-server")
# On shared cores a step may take any time; tests have time limits of their own.
hypothesis.settings.register_profile("onthefly", deadline=None)
hypothesis.settings.load_profile("onthefly")


@pytest.fixture(autouse=True)
def _logs_end_with_their_test() -> Iterator[None]:
    """A command that is run in this process logs to the stream that pytest captures with, and closes after the test;
    other threads, as of a service, would log to it still."""
    yield
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler.formatter, JsonLines)]:
        root.removeHandler(handler)
        root.setLevel(logging.WARNING)


@pytest.fixture(scope="session")
def embedded_url() -> Iterator[str]:
    """One embedded broker for the whole session; nobody empties it, so use run names of your own."""
    with EmbeddedBroker() as broker:
        yield broker.url


@pytest.fixture(scope="session", params=SERVERS)
def _server_url(request: pytest.FixtureRequest) -> Iterator[str]:
    binary = None
    if request.param == "redis-server":
        binary = shutil.which("redis-server")
        if binary is None:
            pytest.skip("redis-server is not on PATH: the contract is tested on the embedded server only")
    with EmbeddedBroker(binary=binary) as broker:
        yield broker.url


@pytest.fixture
def broker_url(_server_url: str) -> str:
    """An empty broker, once the embedded one and once Redis."""
    with connect(_server_url) as client:
        client.flushall()
        client.script_flush()
    return _server_url
