"""Captions' versions that replicas share, on the embedded Valkey and on Redis."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from protocol import keys
from protocol.broker import connect
from protocol.bus import Bus, BusConfig
from protocol.bus_captions import CaptionStore
from protocol.entries import Versions
from protocol.errors import BrokerUnavailable

ONE = Versions(texts=["a dog asleep", "a dog “awake”"], by=["llama", "template"])
OTHER = Versions(texts=["a cat"], by=["llama"])


@pytest.fixture
def store(broker_url: str) -> Iterator[CaptionStore]:
    bus = Bus(broker_url, BusConfig(), patient=False)
    yield bus.captions
    bus.close()


def test_the_first_writer_wins(store: CaptionStore):
    assert store.put("x", ONE, 100) == ONE
    assert store.put("x", OTHER, 100) == ONE
    assert store.get(["nothing", "x"]) == [None, ONE]
    assert store.get([]) == []


def test_they_run_out_when_their_first_writer_said(store: CaptionStore, broker_url: str):
    store.put("x", ONE, 500)
    store.put("x", OTHER, 10_000)
    with connect(broker_url) as raw:
        assert 490 <= raw.ttl(keys.versions("x")) <= 500


def test_what_cannot_be_read_is_nothing(store: CaptionStore, broker_url: str):
    with connect(broker_url) as raw:
        raw.set(keys.versions("x"), b'{"from": "the future"}')
    assert store.get(["x"]) == [None]
    assert store.put("x", ONE, 100) == ONE


def test_a_broker_that_is_away_is_told():
    bus = Bus("redis://127.0.0.1:1/0", BusConfig(), patient=False)
    with pytest.raises(BrokerUnavailable):
        bus.captions.get(["x"])
    with pytest.raises(BrokerUnavailable):
        bus.captions.put("x", ONE, 1)
