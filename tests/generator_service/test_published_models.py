"""Published models on disk and over HTTP: versions, bad files, access, limits, and many publishers at a time."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load, save

from generator_service import published_models, uploads
from generator_service.published_models import PublishedModels
from generator_service.service import Service
from protocol.client import GeneratorClient
from protocol.client_async import AsyncGeneratorClient
from protocol.errors import (
    BadFile,
    BodyTooLarge,
    Forbidden,
    IdempotencyConflict,
    InvalidRequest,
    ServiceUnreachable,
    Unauthorized,
    UnknownWeights,
    WeightsCorrupt,
)
from protocol.published import ENTRY, PublishedModel
from tests.generator_service.published_file import card, published_file
from tests.generator_service.test_app import problem
from tests.generator_service.tiny_service import make_service, served, started

OCTETS = {"Content-Type": "application/octet-stream"}
FACE = "/v1/published-models/face"


@pytest.fixture
def store(tmp_path: Path) -> PublishedModels:
    return PublishedModels(tmp_path / "published")


def publish(store: PublishedModels, data: bytes, name: str = "face") -> PublishedModel:
    """From a file of its own, as uploads are."""
    path = store.root.parent / f"file-{threading.get_ident()}"
    path.write_bytes(data)
    return store.publish(name, path)


def versions(store: PublishedModels) -> list[str]:
    return [str(model) for model in store.list()]


# ---------------------------------------------------------------- the folder


def test_what_is_published_is_found_again(store: PublishedModels):
    assert store.list() == []
    data = published_file(iteration=4, updates=99)
    made = publish(store, data)
    again = PublishedModels(store.root)  # another replica's
    assert again.find("face") == made == again.find("face", 1) and again.list() == [made]
    assert again.content(made) == data and made.size_bytes == len(data)
    assert made.card == card(iteration=4, updates=99)
    assert (made.name, made.version, made.problem) == ("face", 1, None)


def test_equal_bytes_are_the_same_version_and_others_the_next(store: PublishedModels):
    first, second = published_file(seed=1), published_file(seed=2)
    made = [publish(store, data) for data in (first, first, second, first, second)]
    assert [model.version for model in made] == [1, 1, 2, 1, 2]
    assert made[1] == made[0] and publish(store, first, "gait").version == 1
    assert versions(store) == ["face@1", "face@2", "gait@1"]
    assert not list(store.root.glob(".staging*"))


def test_the_newest_versions_are_kept_and_those_that_are_pinned(tmp_path: Path):
    store = PublishedModels(tmp_path / "published", keep=2)
    made = [publish(store, published_file(updates=1))]
    store.pin(made[0], "job-1")
    for updates in range(2, 6):
        made.append(publish(store, published_file(updates=updates)))
    assert versions(store) == ["face@1", "face@4", "face@5"]
    with pytest.raises(UnknownWeights, match="face@2"):
        store.find("face", 2)
    with pytest.raises(UnknownWeights, match="face@2"):
        store.content(made[1])
    with pytest.raises(UnknownWeights, match="face@2"):
        store.pin(made[1], "job-1")
    store.unpin(made[0], "job-1")
    store.unpin(made[0], "job-1")
    assert publish(store, published_file(updates=6)).version == 6
    assert versions(store) == ["face@5", "face@6"] and not list(store.root.glob(".trash*"))


def test_a_pin_that_nobody_renews_ends(tmp_path: Path):
    store = PublishedModels(tmp_path / "published", keep=2)
    made = publish(store, published_file(updates=1))
    store.pin(made, "job-1")
    pinned = store.root / "face" / "1" / "job-1.pin"
    old = time.time() - published_models.PINNED_S
    os.utime(pinned, (old, old))
    store.pin(made, "job-1")
    for updates in (2, 3):
        publish(store, published_file(updates=updates))
    assert versions(store) == ["face@1", "face@2", "face@3"]
    os.utime(pinned, (old, old))
    publish(store, published_file(updates=4))
    assert versions(store) == ["face@3", "face@4"]


@pytest.mark.parametrize("same", [True, False], ids=["equal bytes", "others"])
def test_publishers_at_a_time_get_versions_of_their_own(tmp_path: Path, same: bool):
    """Each through a store of its own, as replicas have."""
    files = [published_file(updates=0 if same else index) for index in range(8)]
    start, made = threading.Barrier(len(files)), []

    def work(index: int) -> None:
        store, path = PublishedModels(tmp_path / "published", keep=20), tmp_path / str(index)
        path.write_bytes(files[index])
        start.wait()
        made.append(store.publish("face", path))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(files))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store = PublishedModels(tmp_path / "published")
    expected = [1] if same else list(range(1, 9))
    assert sorted({model.version for model in made}) == expected == [model.version for model in store.list()]
    assert sorted(store.content(model) for model in store.list()) == sorted(set(files))
    assert len(made) == 8 and not list(store.root.glob(".staging*"))


def test_a_file_damaged_since_is_told_and_published_anew(store: PublishedModels):
    data = published_file()
    made = publish(store, data)
    path = store.root / "face" / "1" / "model.safetensors"
    path.write_bytes(data[:-1])
    with pytest.raises(WeightsCorrupt, match=r"sha256.*publish it again"):
        store.content(made)
    assert publish(store, data).version == 2
    path.unlink()
    with pytest.raises(WeightsCorrupt, match="missing"):
        store.content(made)


@pytest.mark.parametrize("text", ["", "{", '{"digest": 3}'])
def test_a_manifest_that_cannot_be_read_is_listed_with_its_problem(store: PublishedModels, text: str):
    publish(store, published_file(updates=1))
    publish(store, published_file(updates=2))
    (store.root / "face" / "1" / "manifest.json").write_text(text)
    assert [model.problem is None for model in store.list()] == [False, True]
    assert "manifest.json" in store.list()[0].problem
    with pytest.raises(WeightsCorrupt, match="remove its folder"):
        store.find("face", 1)
    assert store.find("face").version == 2


# ---------------------------------------------------------------- bad files


def without(name: str) -> Callable[[dict], object]:
    return lambda state: state.pop(name)


def filled(value: float) -> Callable[[dict], object]:
    return lambda state: state["conv1.0.weight"].view(-1)[3:4].fill_(value)


def replaced(**tensors: torch.Tensor) -> Callable[[dict], object]:
    return lambda state: state.update(tensors)


def described(**fields: str | None) -> bytes:
    """A good file but for JSON of its card; None: it is missing."""
    told = {name: json.dumps(value) for name, value in json.loads(card().model_dump_json()).items()} | fields
    text = ", ".join(f'"{name}": {value}' for name, value in told.items() if value is not None)
    return save(load(published_file()), {ENTRY: f"{{{text}}}"})


STEM = "conv1.0.weight"
BAD = {
    "empty": (b"", "not safetensors"),
    "text": (b"hello, this is a text", "not safetensors"),
    "pickle": (b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x07", "not safetensors"),
    "cut": (published_file()[:-100], "damaged"),
    "too long": (published_file() + b"\0", "damaged"),
    "huge header": (b"\xff" * 8 + published_file()[8:], "damaged"),
    "foreign": (save({"a": torch.zeros(2)}, {"format": "pt"}), "metadata"),
    "no metadata": (save({"a": torch.zeros(2)}), "metadata"),
    "no model": (described(model=None), "model"),
    "not json": (described(size="32 x 32"), "metadata"),
    "deep": (described(size="[" * 100_000), "metadata"),
    "size of one": (described(size="[32]"), "size"),
    "size of text": (described(size='["32", "32"]'), "size"),
    "no size": (described(size="[0, 32]"), "size"),
    "spread of 0": (described(std="[0, 1, 1]"), "std"),
    "not finite": (described(mean="[NaN, 0, 0]"), "mean"),
    "unknown field": (described(colour='"red"'), "colour"),
    "unknown model": (described(model='"resnet5O"'), "close matches: resnet50"),
    "a hub's model": (described(model='"hf-hub:timm/resnet50"'), "model"),
    "reads a file": (described(options='{"checkpoint_path": "/etc/passwd"}'), "checkpoint_path"),
    "fetches": (described(options='{"pretrained": true}'), "pretrained"),
    "odd value": (described(options='{"img_size": {"a": 1}}'), "img_size"),
    "huge value": (described(options='{"img_size": 99999999}'), "img_size"),
    "patch of 0": (save({}, card("test_vit", options={"patch_size": 0}).metadata()), "cannot build"),
    "pool that is no text": (described(options='{"global_pool": 3}'), "cannot build"),
    "unknown option": (described(options='{"img_size": 32}'), "cannot build"),
    "missing": (published_file(change=without(STEM)), f"'{STEM}' is missing"),
    "too many": (published_file(change=replaced(more=torch.zeros(2))), "'more'.*left out"),
    "shape": (published_file(change=replaced(**{STEM: torch.zeros(1, 3, 3, 3)})), "should be"),
    "whole numbers": (published_file(change=lambda state: state.update({STEM: state[STEM].long()})), "int64"),
    "another model": (save(load(published_file()), card("resnet10t").metadata()), "do not fit timm's 'resnet10t'"),
    "nan": (published_file(change=filled(float("nan"))), "NaN"),
    "inf": (published_file(change=filled(float("inf"))), "infinite"),
    "size it cannot take": (published_file("test_vit", (40, 40), options={"img_size": 32}), "40 x 40"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_refused_and_leaves_nothing(store: PublishedModels, kind: str):
    data, said = BAD[kind]
    with pytest.raises(InvalidRequest, match=said):
        publish(store, data)
    assert store.list() == [] and not store.root.exists()


@pytest.mark.parametrize("name", ["", "../face", ".face", "a/b", "x" * 65, "face@1"])
def test_a_bad_name_is_refused(store: PublishedModels, name: str):
    with pytest.raises(InvalidRequest, match="no name"):
        publish(store, published_file(), name)


def test_there_are_only_so_many_names(store: PublishedModels, monkeypatch):
    monkeypatch.setattr(published_models, "NAMES", 2)
    for name in ("face", "hand", "face"):
        publish(store, published_file(updates=len(store.list())), name)
    with pytest.raises(InvalidRequest, match="names of published models are taken") as caught:
        publish(store, published_file(), "foot")
    assert caught.value.param == "name" and versions(store) == ["face@1", "face@2", "hand@1"]


def test_checking_a_file_draws_no_random_numbers(store: PublishedModels):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    publish(store, published_file())
    assert torch.equal(before, torch.get_rng_state())


# ---------------------------------------------------------------- over HTTP


@pytest.fixture
def serve(tmp_path: Path, scripted_settings: dict) -> Callable:
    @contextmanager
    def serve(**settings: object) -> Iterator[tuple[Service, str]]:
        with started(make_service(tmp_path, **scripted_settings, **settings)) as service, served(service) as url:
            yield service, url

    return serve


def uploaded(service: Service) -> list[Path]:
    return list(service.published.uploads.glob("*"))


def nothing_left(service: Service) -> bool:
    """An answer may be read before what its request left is removed."""
    deadline = time.monotonic() + 10
    while uploaded(service) and time.monotonic() < deadline:
        time.sleep(0.01)
    return uploaded(service) == []


def test_a_client_publishes_bytes_and_files(serve: Callable, tmp_path: Path):
    data, path = published_file(updates=1), tmp_path / "model.safetensors"
    path.write_bytes(published_file(updates=2))
    with serve() as (service, url), GeneratorClient(url) as client:
        first, second = client.publish_model("face", data), client.publish_model("face", path)
        assert client.publish_model("face", str(path)) == second
        assert (str(first), str(second)) == ("face@1", "face@2")
        assert client.published_models().data == [first, second] == service.published.list()
        assert service.published.content(second) == path.read_bytes()
        with pytest.raises(BadFile, match="name a file that is there"):
            client.publish_model("face", tmp_path / "none")
        with pytest.raises(InvalidRequest, match="not safetensors"):
            client.publish_model("face", b"")
        assert nothing_left(service)
        assert [info.name for info in client.weights().data] == ["base"]


def test_the_async_client_does_the_same(serve: Callable, tmp_path: Path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(published_file(updates=2))

    async def work(url: str) -> None:
        async with AsyncGeneratorClient(url) as client:
            made = await asyncio.gather(
                client.publish_model("face", published_file(updates=1)), client.publish_model("face", path)
            )
            assert sorted(model.version for model in made) == [1, 2]
            assert (await client.published_models()).data == sorted(made, key=lambda model: model.version)

    with serve() as (_, url):
        asyncio.run(work(url))


def test_an_idempotency_key_has_one_effect(serve: Callable):
    with serve() as (service, url), GeneratorClient(url) as client:
        first = client.publish_model("face", published_file(updates=1), "k")
        assert client.publish_model("face", published_file(updates=1), "k") == first
        with pytest.raises(IdempotencyConflict):
            client.publish_model("face", published_file(updates=2), "k")
        assert [model.version for model in service.published.list()] == [1] and nothing_left(service)


def test_who_may_publish(serve: Callable):
    """Whoever has a key that a run uses; everybody with a key sees all."""
    with serve(keys={"alice": "rabbit", "bob": "hatter"}, admin_key="boss") as (_, url):
        with GeneratorClient(url, api_key="rabbit") as alice, GeneratorClient(url, api_key="hatter") as bob:
            made = alice.publish_model("face", published_file())
            assert bob.published_models().data == [made]
            with pytest.raises(Forbidden):
                alice.activate("base")
        with GeneratorClient(url) as nobody:
            for ask in (nobody.published_models, lambda: nobody.publish_model("face", published_file(updates=3))):
                with pytest.raises(Unauthorized):
                    ask()


def test_a_model_larger_than_the_limit_is_refused(serve: Callable):
    data = published_file()
    with serve(max_model_bytes=len(data) - 1, max_body_bytes=2000) as (service, url), GeneratorClient(url) as client:
        with pytest.raises(BodyTooLarge, match=r"generator\.max_model_bytes"):
            client.publish_model("face", data)
        assert service.published.list() == [] and nothing_left(service)


def test_a_model_may_be_larger_than_other_bodies_and_than_the_memory_for_them(serve: Callable):
    with serve(max_body_bytes=2000, limits={"bodies_bytes": 2**16}) as (_, url), GeneratorClient(url) as client:
        assert len(published_file()) > 2**18
        assert client.publish_model("face", published_file()).version == 1


def test_a_large_body_is_not_held_in_memory(serve: Callable):
    """64 MiB that are refused only at their end, since they are no safetensors."""
    size = 64 * 2**20

    def body() -> Iterator[bytes]:
        for _ in range(64):
            yield b"\xff" * 2**20

    with serve() as (_, url), httpx.Client(base_url=url, timeout=60) as client:
        tracemalloc.start()
        answer = client.post(FACE, content=body(), headers=OCTETS)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert "not safetensors" in problem(answer, 422, "invalid_request", "body")
    assert peak < size / 4


def test_requests_that_are_no_uploads_are_refused(serve: Callable):
    with serve() as (service, url), httpx.Client(base_url=url) as client:
        as_json = client.post(FACE, json={"a": 1})
        assert "application/octet-stream" in problem(as_json, 422, "invalid_request", "Content-Type")
        problem(client.post("/v1/published-models/.face", content=b"x", headers=OCTETS), 422, "invalid_request", "name")
        problem(client.post("/v1/published-models/a/b", content=b"x", headers=OCTETS), 404, "not_found")
        assert client.put(FACE, content=b"x").status_code == 405
        assert nothing_left(service)


def test_too_many_uploads_at_a_time_are_told_to_come_back(serve: Callable):
    body = published_file()
    goes_on = threading.Event()
    begun = threading.Semaphore(0)

    def slowly() -> Iterator[bytes]:
        yield body[:100]
        begun.release()
        goes_on.wait(30)
        yield body[100:]

    with serve() as (service, url):
        answers: list[int] = []

        def post() -> None:
            answers.append(httpx.post(f"{url}{FACE}", content=slowly(), headers=OCTETS, timeout=60).status_code)

        threads = [threading.Thread(target=post) for _ in range(uploads.AT_ONCE)]
        for thread in threads:
            thread.start()
        for _ in threads:
            begun.acquire()
        while len(uploaded(service)) < uploads.AT_ONCE:
            time.sleep(0.01)
        refused = httpx.post(f"{url}{FACE}", content=body, headers=OCTETS)
        problem(refused, 503, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        goes_on.set()
        for thread in threads:
            thread.join()
        assert answers == [201] * uploads.AT_ONCE
        assert [model.version for model in service.published.list()] == [1] and nothing_left(service)


def test_an_upload_that_breaks_off_leaves_nothing(serve: Callable):
    with serve() as (service, url):

        def broken() -> Iterator[bytes]:
            yield published_file()[:1000]
            raise ConnectionError("the sender is gone")

        with pytest.raises(ConnectionError):
            httpx.post(f"{url}{FACE}", content=broken(), headers=OCTETS)
        assert nothing_left(service) and service.published.list() == []


def test_what_killed_processes_left_is_removed_after_a_day(serve: Callable):
    with serve() as (service, url), GeneratorClient(url) as client:
        service.published.uploads.mkdir(parents=True)
        old, new = (service.published.uploads / f"{name}.upload" for name in ("old", "new"))
        for path in (old, new):
            path.write_bytes(b"x")
        then = time.time() - uploads.FORGOTTEN_S - 1
        os.utime(old, (then, then))
        client.publish_model("face", published_file())
        assert uploaded(service) == [new]


def test_a_client_does_not_send_longer_than_its_deadline(serve: Callable, tmp_path: Path):
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(2**30)
    with serve() as (_, url), GeneratorClient(url, retries=0, deadline=0.05) as client:
        began = time.monotonic()
        with pytest.raises(ServiceUnreachable):
            client.publish_model("face", path)
        assert time.monotonic() - began < 5


def test_what_is_listed_is_json_that_others_can_read(serve: Callable):
    with serve() as (_, url), GeneratorClient(url) as client:
        client.publish_model("face", published_file(iteration=3))
        entry = json.loads(httpx.get(f"{url}/v1/published-models").content)["data"][0]
    assert entry["card"]["size"] == [32, 32] and entry["card"]["iteration"] == 3 and entry["problem"] is None
