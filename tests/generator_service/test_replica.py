"""Replicas together: activation through one reaches the others, and each says which weights it serves."""

from __future__ import annotations

import asyncio
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import httpx

from generator_service.backends.interface import WeightSet
from generator_service.service import Service
from protocol import keys
from protocol.broker import connect
from protocol.bus import Bus, QueueConfig
from protocol.messages import WeightsRef
from tests.generator_service.conftest import scripted
from tests.generator_service.test_queue_worker import batches, publish, work_row, work_unit
from tests.generator_service.tiny_service import make_service, served, started


@contextmanager
def replica(folder: Path, queue_url: str, settings: dict, **more) -> Iterator[tuple[Service, httpx.Client]]:
    service = make_service(folder, queue_url, **settings, **more)
    with started(service), served(service) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield service, client
        scripted(service).release()


@contextmanager
def pair(tmp_path: Path, queue_url: str, settings: dict, *, shared: bool = True):
    """Two replicas, with one weights folder or one each."""
    folders = [tmp_path / "weights", tmp_path / ("weights" if shared else "other")]
    with (
        replica(tmp_path / "a", queue_url, settings, weights_dir=folders[0]) as first,
        replica(tmp_path / "b", queue_url, settings, weights_dir=folders[1]) as second,
    ):
        yield first, second


def make(service: Service, content: bytes = b"table") -> WeightSet:
    """A new version of the set "pets"."""
    store = service.loaded.weights
    with store.staging() as folder:
        (folder / "table.safetensors").write_bytes(content)
        return store.publish(folder, "pets", store.base, "class_embedding", store.base.classes, {})


def serving(client: httpx.Client) -> dict[str, tuple[str, int]]:
    """Replica -> name and version of the weights it says it serves."""
    every = client.get("/v1/replicas").json()["data"]
    return {entry["name"]: (entry["weights"]["name"], entry["weights"]["version"]) for entry in every}


def default_weights(client: httpx.Client) -> int:
    """Version of the weights that a request gets which names none."""
    answer = client.post("/v1/images/generations", json={"prompt": "alpha"})
    return answer.json()["weights"]["version"] if answer.json()["weights"]["name"] == "pets" else 0


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.02)


def test_activation_through_one_replica_is_answered_once_all_serve_it(tmp_path, queue_url, scripted_settings):
    with pair(tmp_path, queue_url, scripted_settings) as ((a, at_a), (b, at_b)):
        make(a), make(a, b"newer")
        answer = at_a.post("/v1/weights/pets/activate", json={"version": 1})
        assert answer.status_code == 200
        assert set(serving(at_b).values()) == {("pets", 1)} and len(serving(at_b)) == 2
        assert default_weights(at_b) == 1
        assert ("load", "pets@1") in scripted(b).events
        with connect(queue_url) as broker:
            broker.expire(keys.CHOICE, 5)
            wait_for(lambda: broker.ttl(keys.CHOICE) > 5)
        assert at_b.post("/v1/weights/pets/activate").json()["version"] == 2
        assert (default_weights(at_a), default_weights(at_b)) == (2, 2)
        assert at_a.post("/v1/weights/base/activate").status_code == 200
        assert (default_weights(at_a), default_weights(at_b)) == (0, 0)


def test_a_busy_replica_follows_after_its_batch_and_is_named_until_then(tmp_path, queue_url, scripted_settings):
    """Meanwhile each replica says what it serves itself, and the activation stands."""
    with pair(tmp_path, queue_url, scripted_settings) as ((a, at_a), (b, at_b)):
        made = make(a)
        scripted(b).hold()
        request = threading.Thread(
            target=at_b.post, args=("/v1/images/generations",), kwargs={"json": {"prompt": "alpha"}}
        )
        request.start()
        assert scripted(b).inside.wait(5)
        answer = at_a.post("/v1/weights/pets/activate", json={"timeout_s": 0.3})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_everywhere")
        name = b.membership.now().name
        assert re.search(rf"pets@1 is active, .*{name}: it serves base@1$", answer.json()["detail"])
        assert int(answer.headers["Retry-After"]) >= 1
        assert serving(at_a) == {a.membership.now().name: ("pets", 1), name: ("base", 1)}
        assert at_a.post("/v1/weights/pets/activate", json={"everywhere": False}).json()["active"]
        scripted(b).release()
        assert at_a.post("/v1/weights/pets/activate", json={"timeout_s": 20}).status_code == 200
        request.join()
        assert b.loaded.weights.active().ref == made.ref


def test_a_replica_that_still_loads_keeps_nobody_waiting(tmp_path, queue_url, scripted_settings):
    with replica(tmp_path, queue_url, scripted_settings) as (service, client):
        make(service)
        bus = Bus(queue_url, QueueConfig(url=queue_url))
        loading = service.membership.now().model_copy(update={"name": "late", "state": "loading", "weights": None})
        bus.board.announce(loading)
        assert "late" in {entry["name"] for entry in client.get("/v1/replicas").json()["data"]}
        assert client.post("/v1/weights/pets/activate", json={"timeout_s": 0.0}).status_code == 200
        bus.close()


def test_activations_that_wait_hold_nobody_up(tmp_path, queue_url, scripted_settings):
    """More of them than the service has threads."""
    with pair(tmp_path, queue_url, scripted_settings) as ((a, at_a), (b, at_b)):
        make(a)
        scripted(b).hold()
        request = threading.Thread(
            target=at_b.post, args=("/v1/images/generations",), kwargs={"json": {"prompt": "alpha"}}
        )
        request.start()
        assert scripted(b).inside.wait(5)

        async def beside_fifty() -> tuple[int, int, list[int]]:
            async with httpx.AsyncClient(base_url=at_a.base_url, timeout=60, limits=httpx.Limits()) as client:
                activate = partial(client.post, "/v1/weights/pets/activate", json={"timeout_s": 40})
                waiting = [asyncio.create_task(activate()) for _ in range(50)]
                await asyncio.sleep(0.5)
                answer = await client.get("/v1/queue")
                pending = sum(not task.done() for task in waiting)
                scripted(b).release()
                return answer.status_code, pending, [(await task).status_code for task in waiting]

        assert asyncio.run(beside_fifty()) == (200, 50, [200] * 50)
        request.join()


def test_work_that_is_pinned_to_older_weights_is_still_made_with_them(tmp_path, queue_url, scripted_settings):
    bus = Bus(queue_url, QueueConfig(url=queue_url, lease_idle_s=1.0))
    with pair(tmp_path, queue_url, scripted_settings) as ((a, at_a), (b, _)):
        old = make(a)
        new = make(a, b"newer")
        assert at_a.post("/v1/weights/pets/activate", json={"version": 2}).status_code == 200
        publish(bus, *(work_unit(n, old.ref, work_row(n), units=4) for n in range(4)))
        assert {batch.weights for batch in batches(bus, 4)} == {old.ref}
        made_with = [
            event[1] for s in (a, b) for event in scripted(s).events if event[0] == "batch" and event[1] != "base@1"
        ]
        assert made_with == ["pets@1"] * 4
        assert {(new.ref.name, new.ref.version)} == set(serving(at_a).values())
    bus.close()


def test_a_replica_without_the_weights_says_so_and_goes_on_with_its_own(tmp_path, queue_url, scripted_settings):
    with pair(tmp_path, queue_url, scripted_settings, shared=False) as ((a, at_a), (b, at_b)):
        make(a)
        answer = at_a.post("/v1/weights/pets/activate", json={"timeout_s": 0.5})
        assert answer.status_code == 503
        name = b.membership.now().name
        assert f"{name}: no weights 'pets@1' here" in answer.json()["detail"]
        problems = {entry["name"]: entry["problem"] for entry in at_a.get("/v1/replicas").json()["data"]}
        assert "no weights 'pets@1' here" in problems[name] and problems[a.membership.now().name] is None
        assert (default_weights(at_a), default_weights(at_b)) == (1, 0)
        shutil.copytree(tmp_path / "weights" / "pets", tmp_path / "other" / "pets")
        assert at_a.post("/v1/weights/pets/activate", json={"timeout_s": 10}).status_code == 200
        assert default_weights(at_b) == 1 and b.membership.now().problem is None
        assert b.loaded.weights.chosen().ref == a.loaded.weights.chosen().ref, "also after a restart"


def test_a_replica_whose_copy_is_damaged_says_so(tmp_path, queue_url, scripted_settings):
    with pair(tmp_path, queue_url, scripted_settings, shared=False) as ((a, at_a), (b, at_b)):
        make(a)
        shutil.copytree(tmp_path / "weights" / "pets", tmp_path / "other" / "pets")
        (tmp_path / "other" / "pets" / "1" / "table.safetensors").write_bytes(b"altered")
        assert at_a.post("/v1/weights/pets/activate", json={"everywhere": False}).status_code == 200
        wait_for(lambda: "table.safetensors" in (b.membership.now().problem or ""))
        assert default_weights(at_b) == 0


def test_without_a_broker_replicas_look_at_their_common_folder(tmp_path, scripted_settings):
    with pair(tmp_path, "embedded", scripted_settings) as ((a, at_a), (_, at_b)):
        make(a)
        assert at_a.post("/v1/weights/pets/activate").status_code == 200
        wait_for(lambda: default_weights(at_b) == 1)
        assert len(serving(at_b)) == 1


def test_a_broker_that_is_away_activates_nothing(tmp_path, scripted_settings):
    with replica(tmp_path, "redis://127.0.0.1:9/0", scripted_settings) as (service, client):
        make(service)
        answer = client.post("/v1/weights/pets/activate")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "broker_unavailable")
        assert default_weights(client) == 0
        assert not (service.config.weights_dir / ".active.json").exists()


def test_the_choice_of_an_earlier_fleet_is_a_problem_only_while_it_lasts(tmp_path, queue_url, scripted_settings):
    with connect(queue_url) as broker, replica(tmp_path, queue_url, scripted_settings) as (service, client):
        gone = WeightsRef(name="gone", version=1, digest="x").model_dump_json()
        broker.set(keys.CHOICE, gone, ex=keys.CHOICE_TTL_S)
        wait_for(lambda: service.membership.now().problem is not None)
        assert default_weights(client) == 0
        assert broker.pexpire(keys.CHOICE, 300), "nobody serves it, so nobody prolongs it"
        wait_for(lambda: service.membership.now().problem is None)


def test_a_replica_is_announced_while_it_lives(tmp_path, queue_url, scripted_settings):
    bus = Bus(queue_url, QueueConfig(url=queue_url))
    service = make_service(tmp_path, queue_url, **scripted_settings)
    told = service.membership.now()
    assert (told.state, told.weights) == ("loading", None)
    with started(service):
        publish(bus, work_unit(0, service.loaded.weights.base.ref, work_row(1), work_row(2)))
        wait_for(lambda: [entry.images for entry in bus.board.replicas()] == [2])
        told = bus.board.replicas()[0]
        assert (told.state, told.weights) == ("ready", service.loaded.weights.base.ref)
        assert told.busy_s > 0 and told.seen >= told.started
        shown = bus.board.samples("run-1", 10)
        assert {entry.sample.id for entry in shown} == {work_row(1).sample_id, work_row(2).sample_id}
        service.membership.stopping()
        wait_for(lambda: [entry.state for entry in bus.board.replicas()] == ["stopping"])
    assert bus.board.replicas() == []
    bus.close()
