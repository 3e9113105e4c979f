"""What `onthefly up` does before and beside a training: cold start, then tuning; with the real service."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from pydantic import ValidationError

from agent.live_tuning import LiveTuning
from agent.machine import Machine
from agent.settings import AgentConfig
from agent.supervisor import Supervisor
from generator_service.service import Service
from protocol.client import GeneratorClient
from protocol.messages import AdaptJob, Job
from protocol.tuning import TuneJob
from tests.generator_service.published_file import published_file
from tests.generator_service.tiny_dit import save_checkpoint
from tests.generator_service.tiny_service import make_service, served, started, write_dataset
from tests.ports import free_port

SMALL = {
    "rollout": {"identities": 2, "samples": 2, "denoising_steps": 3, "batch_size": 4},
    "guard": {"kl_ceiling": 0, "diversity_floor": 0.0},
    "features": "timm:test_resnet",
    "features_size": 32,
    "pretrained": False,
    "checkpoint_every": 1,
    "grid_every": 0,
}
LONG = TuneJob(name="tuned", steps=100_000, publish_every=2, activate=True, **SMALL)


def small(**more: object) -> TuneJob:
    return TuneJob(name="tuned", **{"steps": 2, **SMALL, **more})


class Place:
    """A service that can be stopped and started again on the same folders and port."""

    def __init__(self, folder: Path):
        self.folder, self.port = folder, free_port()
        data, checkpoint = write_dataset(folder / "data"), save_checkpoint(folder / "checkpoint")
        self.settings = {"dit": {"checkpoint": str(checkpoint), "device": "cpu"}, "dataset": {"root": data}}
        self.stack = ExitStack()

    def start(self) -> Service:
        service = self.stack.enter_context(started(make_service(self.folder, threads=1, **self.settings)))
        self.stack.enter_context(served(service, self.port))
        return service

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setattr("protocol.client_calls._EVENT_DELAY_S", 0.01)
    found = Place(tmp_path)
    found.start()
    with found.stack:
        yield found


@pytest.fixture
def client(place: Place) -> Iterator[GeneratorClient]:
    with GeneratorClient(place.url) as client:
        yield client


def until(true: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


# ---------------------------------------------------------------- before


def test_what_was_adapted_is_tuned(client: GeneratorClient):
    agent = AgentConfig(adapt=AdaptJob(name="cold", steps=2, batch_size=4), tune=small(activate=True))
    with Supervisor() as nobody:
        assert Machine(nobody, client, [], {}).prepare(agent) is None
        again = Machine(nobody, client, [], {}).prepare(agent)  # both were done before
    made = {str(info): info for info in client.weights().data}
    assert again is None and set(made) == {"base@1", "cold@1", "tuned@1"}
    assert made["tuned@1"].base == "cold@1" and made["tuned@1"].active


def test_a_base_that_is_named_is_the_one_that_is_tuned(client: GeneratorClient):
    agent = AgentConfig(adapt=AdaptJob(name="cold", steps=2, batch_size=4), tune=small(base="base"))
    with Supervisor() as nobody:
        Machine(nobody, client, [], {}).prepare(agent)
    assert {info.name: info.base for info in client.weights().data}["tuned"] == "base@1"


def test_what_is_tuned_while_training_is_only_adapted_before(client: GeneratorClient):
    agent = AgentConfig(adapt=AdaptJob(name="cold", steps=2, batch_size=4), tune=LONG, tune_while_training=True)
    with Supervisor() as nobody:
        job = Machine(nobody, client, [], {}).prepare(agent)
    assert job == LONG.model_copy(update={"base": "cold@1"})
    assert {info.name for info in client.weights().data} == {"base", "cold"}


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({"tune_while_training": True}, "nothing to tune"),
        ({"tune_while_training": True, "tune": {"name": "t", "activate": True}}, "publish_every"),
        ({"tune_while_training": True, "tune": {"name": "t", "publish_every": 3}}, "tune.activate = true"),
    ],
)
def test_settings_under_which_nothing_would_be_served_are_refused(table: dict, told: str):
    with pytest.raises(ValidationError, match=told):
        AgentConfig.model_validate(table)


def test_a_table_that_is_included_can_be_taken_back():
    assert AgentConfig.model_validate({"tune": False}).tune is None
    with pytest.raises(ValidationError):
        AgentConfig.model_validate({"tune": True})


# ---------------------------------------------------------------- beside


def test_weights_are_exchanged_while_it_trains_and_the_job_ends_with_the_training(client: GeneratorClient):
    said: list[str] = []
    with LiveTuning(client, LONG, lambda: False, said.append):
        until(lambda: client.weights().active.name == "tuned" and client.weights().active.version >= 2)
    (job,) = client.jobs().data
    until(lambda: client.job(job.id).status == "cancelled")
    reached = client.job(job.id).step
    assert [line for line in said if "weights tuned@2" in line]
    assert not [line for line in said if "ended" in line]  # that it was cancelled is nobody's news
    with LiveTuning(client, LONG, lambda: False, said.append):  # goes on from its checkpoint
        until(lambda: begun(client, job.id))
        assert begun(client, job.id)[0].step >= reached


def begun(client: GeneratorClient, earlier: str) -> list[Job]:
    """Jobs but that one which have made a step."""
    return [job for job in client.jobs().data if job.id != earlier and job.step > 0]


def test_it_waits_for_the_model_that_the_training_is_to_publish(client: GeneratorClient):
    said: list[str] = []
    with LiveTuning(client, small(features="published:mine", features_size=None), lambda: False, said.append):
        time.sleep(1.5)
        assert client.jobs().data == [] and said == []
        client.publish_model("mine", published_file())
        until(lambda: [job for job in client.jobs().data if job.status == "succeeded"])
    (tuned,) = (info for info in client.weights().data if info.name == "tuned")
    assert tuned.metadata["features"]["exactly"] == "published:mine@1"


def test_a_training_that_publishes_nothing_has_its_end(client: GeneratorClient):
    with LiveTuning(client, small(features="published:mine", features_size=None), lambda: False, print):
        time.sleep(0.2)
    assert client.jobs().data == []


def test_a_failure_is_told_and_stops_nothing(client: GeneratorClient):
    said: list[str] = []
    with LiveTuning(client, small(base="nowhere"), lambda: False, said.append):
        until(lambda: said)
    assert "the training goes on with the weights that are served" in said[0] and "nowhere" in said[0]


def test_it_is_begun_again_when_the_generator_dies(place: Place, client: GeneratorClient):
    said: list[str] = []
    with LiveTuning(client, LONG, lambda: False, said.append):
        until(lambda: client.weights().active.name == "tuned")
        place.stack.close()
        second = place.start()
        until(lambda: any(job.step > 0 for job in second.jobs.list()), 90.0)
    assert [line for line in said if "begun again" in line]


def test_without_any_generator_it_is_given_up_and_the_training_goes_on():
    said: list[str] = []
    with (
        GeneratorClient("http://127.0.0.1:9", retries=0) as nobody,
        LiveTuning(nobody, LONG, lambda: True, said.append),
    ):
        until(lambda: said)
    assert len(said) == 1 and said[0].startswith("the tuning is given up: ")


def test_a_training_that_ends_meanwhile_does_not_wait_for_a_generator():
    said: list[str] = []
    began = time.monotonic()
    with (
        GeneratorClient("http://127.0.0.1:9", retries=0) as nobody,
        LiveTuning(nobody, LONG, lambda: False, said.append),
    ):
        time.sleep(0.1)
    assert time.monotonic() - began < 10 and said == []
