from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.broker import EmbeddedBroker, connect
from tests.generator_service.tiny_dit import save_checkpoint
from tests.generator_service.tiny_service import write_dataset


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def _system_broker() -> Iterator[str]:
    with EmbeddedBroker() as broker:
        yield broker.url


@pytest.fixture
def broker(_system_broker: str) -> str:
    """An empty broker that only the tests of this folder use."""
    with connect(_system_broker) as client:
        client.flushall()
    return _system_broker


@pytest.fixture
def environment(broker: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "ONTHEFLY_BROKER_URL": broker}
