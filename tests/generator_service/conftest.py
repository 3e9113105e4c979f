from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from generator_service import queue_worker, registry, replica
from generator_service.service import Service
from protocol.broker import EmbeddedBroker, connect
from tests.generator_service.scripted import ScriptedBackend
from tests.generator_service.tiny_dit import save_checkpoint
from tests.generator_service.tiny_service import make_service, started, write_dataset


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def dataset_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="session", autouse=True)
def _short_claims() -> Iterator[None]:
    """Idle queue threads look up often, so that services stop fast."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(queue_worker, "BLOCK_S", 0.05)
        patch.setattr(replica, "LOOK_S", 0.1)
        yield


@pytest.fixture(scope="session")
def _queue_server() -> Iterator[str]:
    with EmbeddedBroker() as broker:
        yield broker.url


@pytest.fixture
def queue_url(_queue_server: str) -> str:
    """A broker of this folder's own, empty: the stream `work` is everybody's, and workers here take all of it."""
    with connect(_queue_server) as client:
        client.flushall()
    return _queue_server


@pytest.fixture
def dit_settings(checkpoint: Path, dataset_root: Path) -> dict:
    """Settings of a service on the tiny DiT, with the dataset mounted."""
    return {"dit": {"checkpoint": str(checkpoint), "device": "cpu"}, "dataset": {"root": dataset_root}}


@pytest.fixture
def dit_service(tmp_path: Path, dit_settings: dict) -> Iterator[Service]:
    with started(make_service(tmp_path, **dit_settings)) as service:
        yield service


@pytest.fixture(scope="session")
def scripted_settings(checkpoint: Path) -> Iterator[dict]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.BACKENDS, "scripted", "tests.generator_service.scripted:ScriptedBackend")
        yield {"backend": "scripted", "scripted": {"checkpoint": checkpoint}}


@pytest.fixture
def scripted_service(tmp_path: Path, scripted_settings: dict) -> Iterator[Service]:
    with started(make_service(tmp_path, **scripted_settings)) as service:
        yield service
        scripted(service).release()


@pytest.fixture(scope="session")
def clip_settings(checkpoint: Path) -> Iterator[dict]:
    """Settings of a service on the scripted backend that makes clips."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.BACKENDS, "scripted_clips", "tests.generator_service.scripted_clips:ScriptedClips")
        yield {"backend": "scripted_clips", "scripted_clips": {"checkpoint": checkpoint}, "videos": {"frames": 6}}


def scripted(service: Service) -> ScriptedBackend:
    backend = service.loaded.backend
    assert isinstance(backend, ScriptedBackend)
    return backend
