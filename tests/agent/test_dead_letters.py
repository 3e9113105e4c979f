"""`onthefly dead ...` against a real service and broker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import cli
from generator_service.service import Service
from protocol import keys
from protocol.broker import EmbeddedBroker, connect
from protocol.bus import Bus, BusConfig
from protocol.errors import GenerationFailed
from tests.generator_service.tiny_service import make_service, served
from tests.protocol.messages_to_send import reply, unit

COUNT = 3


@pytest.fixture(scope="module")
def broker() -> Iterator[str]:
    with EmbeddedBroker() as broker:
        yield broker.url


@pytest.fixture
def bus(broker: str) -> Iterator[Bus]:
    """With three units that failed, and one entry that cannot be read, the newest."""
    with connect(broker) as client:
        client.flushall()
        made = Bus(broker, BusConfig())
        made.publish_plan("r", 0, "p", [unit(number=n, units=COUNT) for n in range(COUNT)], {}, reply(units=COUNT))
        for _ in range(COUNT):
            made.fail_work(made.claim_work("w", 0), GenerationFailed("out of paint").to_problem())
        client.xadd(keys.WORK, {"body": "rubbish"})
        assert made.claim_work("w", 0) is None
    yield made
    made.close()


@pytest.fixture
def url(bus: Bus, tmp_path: Path, broker: str) -> Iterator[str]:
    service: Service = make_service(tmp_path, broker)  # not started: operators need no model
    with served(service) as url:
        yield url
    service.stop()


@pytest.fixture(autouse=True)
def _no_log_handler_outlives_the_captured_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.cli.logs.setup", lambda process: None)


def dead(*arguments: str, url: str) -> int:
    return cli.main(["dead", *arguments, "--url", url])


def test_list_retry_and_drop(bus: Bus, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    unreadable, last, middle, first = (info.id for info in bus.dead.newest().data)
    assert dead("list", "--limit", "3", url=url) == 0
    said = capsys.readouterr().out
    assert all(part in said for part in (unreadable, last, middle, "r.0.2.print", "out of paint", "unreadable entry"))
    assert first not in said
    assert "4 dead letters, the newest 3 shown" in said

    assert dead("retry", first, middle, url=url) == 0
    assert capsys.readouterr().out.splitlines() == [f"{first} retried  r.0.0.print", f"{middle} retried  r.0.1.print"]
    assert [bus.claim_work("w", 0).message.unit for _ in range(2)] == [0, 1]
    assert dead("drop", last, url=url) == 0
    assert [info.id for info in bus.dead.newest().data] == [unreadable]


def test_what_cannot_be_is_told_and_the_rest_is_done(bus: Bus, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    unreadable = bus.dead.newest(1).data[0].id
    assert dead("retry", "--all", url=url) == 1
    captured = capsys.readouterr()
    assert captured.out.count("retried") == COUNT
    assert f"{unreadable}: dead letter {unreadable} holds no work unit" in captured.err
    assert bus.dead.newest().total == 1
    assert dead("drop", "1-1", unreadable, url=url) == 1
    assert "1-1: no dead letter 1-1" in capsys.readouterr().err
    assert bus.dead.newest().total == 0
    assert dead("list", url=url) == 0
    assert capsys.readouterr().out == "0 dead letters\n"


def test_all_is_more_than_a_page(bus: Bus, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.dead_letters.PAGE", 2)
    assert dead("drop", "--all", url=url) == 0
    assert bus.dead.newest().total == 0


@pytest.mark.parametrize("arguments", [["retry"], ["drop", "--all", "1-1"], ["retry", "x"], ["list", "--limit", "0"]])
def test_mistakes_are_told(arguments: list[str], url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert dead(*arguments, url=url) != 0
    assert capsys.readouterr().err
