"""The broker's process is killed while it is written to, with the append-only file on."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time

import pytest

from protocol import keys
from protocol.broker import EmbeddedBroker, connect
from protocol.bus import Bus, BusConfig
from protocol.entries import WorkUnit
from protocol.errors import BrokerUnavailable
from tests.conftest import SERVERS
from tests.protocol.messages_to_send import batch, pixels, reply, unit


def wait_until(condition, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def answers(bus: Bus) -> str | None:
    """Id of the server's present life; None: it is dead."""
    try:
        return bus.server()
    except BrokerUnavailable:
        return None


class Publisher(threading.Thread):
    """Publishes plans, one after another, and answers every other unit."""

    def __init__(self, url: str):
        super().__init__()
        self.bus = Bus(url, BusConfig(work_gate=10**6, batch_gate=10**6))
        self.published: list[str] = []  # units, acknowledged by the broker
        self.answered: list[str] = []
        self.enough = threading.Event()

    def run(self) -> None:
        number = 0
        while not self.enough.is_set():
            try:
                one = unit(feedback=number, units=1)
                self.bus.publish_plan("r", number, "print", [one], {}, reply(feedback=number))
                self.published.append(one.id)
                number += 1
                if number % 2:
                    delivery = self.bus.claim_work("w", 0)
                    assert delivery is not None
                    self.bus.finish_work(delivery, batch(delivery), pixels(delivery))
                    self.answered.append(delivery.message.id)
            except BrokerUnavailable:
                time.sleep(0.05)
        self.bus.close()


@pytest.mark.parametrize("server", SERVERS)
def test_nothing_that_was_acknowledged_is_lost(server: str) -> None:
    binary = shutil.which("redis-server") if server == "redis-server" else None
    if server == "redis-server" and binary is None:
        pytest.skip("redis-server is not on PATH")
    with EmbeddedBroker(append_only=True, binary=binary) as broker, connect(broker.url) as client:
        publisher = Publisher(broker.url)
        publisher.start()
        try:
            for death in (1, 2):
                wait_until(lambda death=death: len(publisher.answered) > 60 * death)
                server_id = publisher.bus.server()
                os.kill(client.info("server")["process_id"], signal.SIGKILL)
                wait_until(lambda server_id=server_id: answers(publisher.bus) not in (None, server_id))
            before = len(publisher.answered)
            wait_until(lambda: len(publisher.answered) > before)
        finally:
            publisher.enough.set()
            publisher.join()
        waiting = {WorkUnit.model_validate_json(fields[b"body"]).id for _, fields in client.xrange(keys.WORK)}
        done = {key.decode().removeprefix(keys.done("")) for key in client.scan_iter(keys.done("*"), count=1000)}
        assert waiting | done == set(publisher.published)
        assert not waiting & done
        assert set(publisher.answered) <= done
        assert client.xlen(keys.batches("r")) == len(done) == len(list(client.scan_iter(keys.blob("*"), count=1000)))
