"""A whole machine: where its generators are, and what it does when one dies. Whole runs are in tests/system."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from agent import machine
from agent.machine import Machine
from agent.supervisor import Supervisor, service_is_over
from generator_service.settings import GeneratorConfig
from protocol import config
from protocol.client import GeneratorClient
from protocol.errors import ConfigError, ServiceUnreachable
from protocol.messages import AdaptJob
from tests.generator_service.tiny_dit import save_checkpoint
from tests.generator_service.tiny_service import make_service, served, started, write_dataset
from tests.ports import free_port


def test_the_generators_defaults_are_known_here() -> None:
    defaults = GeneratorConfig()
    assert (machine.HOST, machine.PORT, Path(machine.SAMPLES_DIR)) == (
        defaults.host,
        defaults.port,
        defaults.samples_dir,
    )


def test_replicas_listen_on_consecutive_ports_or_on_free_ones() -> None:
    assert machine._addresses({}, 3) == ("127.0.0.1", [8000, 8001, 8002])
    assert machine._addresses({"port": 9000, "host": "::1"}, 1) == ("::1", [9000])
    _, free = machine._addresses({"port": 0}, 3)
    assert len(set(free)) == 3 and 0 not in free
    with pytest.raises(ConfigError, match="no such host"):
        machine._addresses({"port": 0, "host": "no such host"}, 1)


def test_each_replica_has_a_folder_of_its_own() -> None:
    assert machine._own_folder({}, 0) == []
    assert machine._own_folder({"samples_dir": "/a b"}, 1) == ['generator.samples_dir="/a b-2"']


def test_the_generator_mounts_the_trainer_s_images_unless_it_is_told_otherwise() -> None:
    dataset = {"root": "/a b", "split": "train", "links_to": ["/c"], "max_pixels": 9}
    overrides = machine._same_images(config.Settings({"trainer": {"dataset": dataset}}, ""))
    assert config.load(None, overrides) == {"generator": {"dataset": dataset}}
    for settings in ({}, {"trainer": {}}, {"generator": {"dataset": {}}, "trainer": {"dataset": dataset}}):
        assert machine._same_images(config.Settings(settings, "")) == []


@pytest.fixture
def generator(tmp_path: Path) -> Iterator[Supervisor]:
    """A supervisor with a child in the generator's place: any that runs."""
    (tmp_path / "sleeper.py").write_text("import time; time.sleep(60)")
    with Supervisor() as supervisor:
        supervisor.start("generator", "sleeper", [], {"PYTHONPATH": str(tmp_path)}).keep(service_is_over)
        yield supervisor


def test_an_adaptation_is_begun_again_when_its_generator_dies(
    tmp_path: Path, generator: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("protocol.client_calls._EVENT_DELAY_S", 0.01)
    data, checkpoint = write_dataset(tmp_path / "data"), save_checkpoint(tmp_path / "checkpoint")
    settings = {"dit": {"checkpoint": str(checkpoint), "device": "cpu"}, "dataset": {"root": data}}
    port = free_port()
    job = AdaptJob(name="mine", steps=300, batch_size=4)
    with ExitStack() as later, ExitStack() as now, GeneratorClient(f"http://127.0.0.1:{port}") as client:
        first = now.enter_context(started(make_service(tmp_path, threads=1, **settings)))
        now.enter_context(served(first, port))

        def replace() -> None:
            while not any(job.step > 5 for job in first.jobs.list()):
                pass
            now.close()
            second = later.enter_context(started(make_service(tmp_path, threads=1, **settings)))
            later.enter_context(served(second, port))

        replacing = threading.Thread(target=replace)
        replacing.start()
        try:
            Machine(generator, client, [], {}).adapt(job)
        finally:
            replacing.join()
        assert [info.name for info in client.weights().data].count("mine") == 1


def test_an_adaptation_is_given_up_when_there_is_no_generator_any_more() -> None:
    with Supervisor() as empty, GeneratorClient("http://127.0.0.1:9") as client, pytest.raises(ServiceUnreachable):
        Machine(empty, client, [], {}).adapt(AdaptJob(name="mine"))
