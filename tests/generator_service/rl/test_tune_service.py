"""Tuning by reward as a job of the service: followed, published, hot-swapped, cancelled, and what may go wrong."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch

from generator_service import jobs
from generator_service.rl.rewards import Bank, Generated
from generator_service.service import Service
from generator_service.settings import GeneratorConfig
from protocol.errors import BrokerUnavailable, DiskFull
from tests.generator_service.tiny_service import make_service, served, started

TUNE = {
    "type": "tune",
    "name": "better",
    "base": "base",
    "steps": 4,
    "rollout": {"identities": 3, "samples": 2, "denoising_steps": 3, "batch_size": 4},
    "update": {"batch_size": 4, "learning_rate": 0.05},
    "guard": {"kl_ceiling": 0},
    "features": "timm:test_resnet",
    "features_size": 32,
    "pretrained": False,
}
ASK = {"prompt": "alpha", "seed": 1, "num_inference_steps": 2}
held = threading.Event()  # rewards of the plug-in wait for it


def patient(generated: Generated, bank: Bank, *, worth: float = 1.0) -> torch.Tensor:
    held.wait(30)
    return worth * torch.from_numpy(generated.images).float().mean((1, 2, 3))


def failing(generated: Generated, bank: Bank) -> torch.Tensor:
    """Fails once something was published."""
    failing.calls += 1
    if failing.calls > 2:
        raise RuntimeError("it had enough")
    return torch.from_numpy(generated.images).float().mean((1, 2, 3))


failing.calls = 0


@pytest.fixture(autouse=True)
def _let_go():
    held.set()
    failing.calls = 0
    yield
    held.set()


@pytest.fixture
def service(tmp_path: Path, dit_settings: dict) -> Iterator[Service]:
    plugins = {name: f"{__name__}:{name}" for name in ("patient", "failing")}
    with started(make_service(tmp_path, rewards=plugins, threads=1, **dit_settings)) as service:
        yield service


@pytest.fixture
def client(service) -> Iterator[httpx.Client]:
    with served(service) as url, httpx.Client(base_url=url, timeout=60.0) as client:
        yield client


def begin(client: httpx.Client, **fields) -> str:
    answer = client.post("/v1/jobs", json=TUNE | fields)
    assert answer.status_code == 202, answer.text
    return answer.json()["id"]


def events(client: httpx.Client, job: str) -> list[dict]:
    lines = client.get(f"/v1/jobs/{job}/events").text.splitlines()
    return [json.loads(line[6:]) for line in lines if line.startswith("data: ")]


def ended(client: httpx.Client, job: str) -> dict:
    events(client, job)
    return client.get(f"/v1/jobs/{job}").json()


def image(client: httpx.Client, **fields) -> str:
    answer = client.post("/v1/images/generations", json=ASK | fields)
    assert answer.status_code == 200, answer.text
    return answer.json()["data"][0]["b64_json"]


def sets(client: httpx.Client) -> list[tuple[int, int, bool]]:
    """(version, step, whether it is a job's result) of each set of the name."""
    data = [one for one in client.get("/v1/weights").json()["data"] if one["name"] == "better"]
    return [(one["version"], one["metadata"]["step"], "recipe" in one["metadata"]) for one in data]


# ---------------------------------------------------------------- as it should go


def test_a_job_is_followed_and_its_weights_are_swapped_in(client, service):
    before = image(client)
    job = begin(client, activate=True, publish_every=2)
    told = [event["data"] for event in events(client, job) if event["kind"] == "progress"]
    steps = [data for data in told if "loss" in data]
    assert [data["step"] for data in steps] == [1, 2, 3, 4]
    assert steps[0]["rewards"].keys() == {"semantic", "coverage", "expression"} and "grid" in steps[0]
    assert steps[0]["kl"] == 0 < steps[-1]["kl"] and {data["ratio"] for data in steps} == {1.0}
    assert [data["weights"] for data in told if "weights" in data] == ["better@1"]
    result = ended(client, job)["result"]
    assert (result["kind"], result["base"], result["version"], result["active"]) == ("lora", "base@1", 2, True)
    assert sets(client) == [(1, 2, False), (2, 4, True)]
    for version in (1, 2):
        service.loaded.weights.verify(service.loaded.weights.resolve(f"better@{version}"))
    pictures = [image(client), image(client, model="better@1"), image(client, model="base")]
    assert pictures[2] == before and len(set(pictures)) == 3
    assert list(service.loaded.weights.root.glob(".unfinished-*")) == []


def test_an_equal_job_is_done_once_and_a_part_is_never_taken_for_the_result(client):
    first = ended(client, begin(client, publish_every=1))["result"]
    again = ended(client, begin(client, publish_every=1))["result"]
    assert first == again and len(sets(client)) == 4
    third = ended(client, begin(client, publish_every=1, again=True))["result"]
    assert third["version"] == 8 and [step for _, step, _ in sets(client)] == [1, 2, 3, 4] * 2


def test_without_a_base_it_starts_from_what_is_active(client):
    """Of its own weights it goes on from what they were made of: an equal job stays equal when they are activated."""
    made = ended(client, begin(client, base=None, activate=True))["result"]
    assert made["base"] == "base@1"
    assert ended(client, begin(client, base=None, activate=True))["result"] == made
    other = ended(client, begin(client, base=None, steps=2))["result"]
    assert other["base"] == "better@1"
    assert ended(client, begin(client, base=None, activate=True, again=True))["result"]["base"] == "better@1"


def test_requests_are_served_while_it_goes_on(client, service):
    before = image(client)
    job = begin(client, steps=10_000, checkpoint_every=0)
    with client.stream("GET", f"/v1/jobs/{job}/events") as stream:
        next(line for line in stream.iter_lines() if '"loss"' in line)
    reached = client.get(f"/v1/jobs/{job}").json()["step"]
    assert all(image(client) == before for _ in range(5))
    later = client.get(f"/v1/jobs/{job}").json()
    assert later["status"] == "running" and later["step"] >= reached
    client.delete(f"/v1/jobs/{job}")
    assert ended(client, job)["status"] == "cancelled" and image(client) == before


def test_a_cancelled_job_is_taken_up_again_and_publishes_nothing_twice(client, service):
    wanted = {"steps": 6, "publish_every": 1, "checkpoint_every": 2, "rewards": {"patient": {"weight": 1.0}}}
    job = begin(client, **wanted)
    with client.stream("GET", f"/v1/jobs/{job}/events") as stream:
        for line in stream.iter_lines():
            if "better@3" in line:
                held.clear()
                break
    client.delete(f"/v1/jobs/{job}")
    held.set()
    assert ended(client, job)["status"] == "cancelled"
    assert ended(client, begin(client, **wanted))["status"] == "succeeded"
    assert [step for _, step, _ in sets(client)] == [1, 2, 3, 4, 5, 6]


def test_rewards_of_others_are_named_in_the_settings(client):
    rewards = {"patient": {"weight": 1.0, "options": {"worth": 0.5}}, "semantic": {"weight": 0.0}}
    found = events(client, begin(client, rewards=rewards, steps=1))
    (told,) = [event["data"]["rewards"] for event in found if "rewards" in event["data"]]
    assert told.keys() == rewards.keys() and told["patient"] > 0
    assert ended(client, begin(client, rewards=rewards, steps=1))["status"] == "succeeded"
    with pytest.raises(ValueError, match="rewards"):
        GeneratorConfig.model_validate({"rewards": {"bad": "no function"}})


def test_the_log_of_a_job_is_bounded_and_says_what_it_left_out(client, monkeypatch):
    """Pictures fill it: the newest events stay."""
    monkeypatch.setattr(jobs, "MAX_EVENT_BYTES", 5000)
    job = begin(client, steps=12, grid_every=1)
    ended(client, job)
    found = events(client, job)
    assert found[0]["kind"] == "skipped" and found[-1]["kind"] == "end"
    kept = [event for event in found if event["kind"] == "progress"]
    assert 0 < sum(len(json.dumps(event["data"])) for event in kept) <= 5000
    assert kept[-1]["data"]["step"] == 12 and "grid" in kept[-1]["data"]


# ---------------------------------------------------------------- what may go wrong


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"rewards": {"glamour": {"weight": 1.0}}}, "rewards.glamour"),
        ({"rewards": {"semantic": {"weight": 1.0, "options": {"power": 2.0}}}}, "rewards.semantic"),
        ({"rewards": {"semantic": {"weight": 0.0}}}, None),
        ({"name": "base"}, "name"),
        ({"base": "nothing"}, "model"),
    ],
)
def test_what_cannot_be_done_is_refused_at_once(client, fields, param):
    answer = client.post("/v1/jobs", json=TUNE | fields)
    assert answer.status_code in (404, 422)
    assert param is None or answer.json()["error"]["param"] == param


def test_without_images_there_is_nothing_to_compare_with(tmp_path, dit_settings):
    settings = {"dit": dit_settings["dit"]}
    with started(make_service(tmp_path, **settings)) as service, served(service) as url:
        answer = httpx.post(f"{url}/v1/jobs", json=TUNE)
    assert answer.status_code == 422 and "generator.dataset.root" in answer.json()["detail"]


def test_a_backend_without_a_policy_is_told_so(scripted_service):
    with served(scripted_service) as url:
        answer = httpx.post(f"{url}/v1/jobs", json=TUNE)
    assert answer.status_code == 422 and "cannot be tuned" in answer.json()["detail"]


def test_classes_that_the_base_lacks(tmp_path, dit_settings, dataset_root):
    extra = tmp_path / "more"
    for folder in dataset_root.iterdir():
        (extra / folder.name).mkdir(parents=True)
        for path in folder.iterdir():
            (extra / folder.name / path.name).write_bytes(path.read_bytes())
    (extra / "delta").mkdir()
    (extra / "delta" / "0.png").write_bytes(path.read_bytes())
    settings = dit_settings | {"dataset": {"root": extra}}
    other = make_service(tmp_path / "other", **settings)
    with started(other), served(other) as url, httpx.Client(base_url=url, timeout=60.0) as there:
        problem = ended(there, begin(there))["problem"]
    assert problem["error"]["param"] == "base" and "cold start" in problem["detail"]


def test_a_job_that_fails_leaves_its_last_published_weights_served(client):
    rewards = {"failing": {"weight": 1.0}}
    job = ended(client, begin(client, rewards=rewards, publish_every=1, activate=True))
    assert job["status"] == "failed" and job["problem"]["error"]["code"] == "generation_failed"
    assert "'failing' raised RuntimeError: it had enough" in job["problem"]["detail"]
    assert sets(client) == [(1, 1, False), (2, 2, False)]
    assert client.get("/v1/weights").json()["active"]["version"] == 2
    assert image(client) == image(client, model="better@2")


def test_divergence_ends_the_job_with_its_name_and_the_service_goes_on(client):
    update = {"learning_rate": 1.0, "max_gradient_norm": 0, "epochs": 5, "optimizer_steps": 3, "clip": 1e30}
    before = image(client)
    job = ended(client, begin(client, steps=300, update=update, policy={"parameters": "full"}))
    assert job["status"] == "failed" and job["problem"]["error"]["code"] == "training_diverged"
    assert image(client) == before


def test_a_broker_that_is_away_delays_the_swap_and_not_the_tuning(client, service, monkeypatch, caplog):
    activate, asked = service.loaded.runner._activate, []

    def away_at_first(weights):
        asked.append(str(weights.ref))
        if len(asked) == 1:
            raise BrokerUnavailable("no answer")
        activate(weights)

    monkeypatch.setattr(service.loaded.runner, "_activate", away_at_first)
    job = ended(client, begin(client, publish_every=1, steps=3, activate=True))
    assert job["status"] == "succeeded" and asked == ["better@1", "better@2", "better@3"]
    assert "better@1 are published, and not activated" in caplog.text


def test_a_set_that_cannot_be_published_ends_the_job_and_an_equal_one_goes_on(client, service, monkeypatch):
    """The compute thread has let go of the job's folders before anybody else gets them."""
    publish = service.loaded.weights.publish

    def full(folder, name, *rest):
        if folder.name.startswith("set-0000002"):
            raise DiskFull("no room left: free some")
        return publish(folder, name, *rest)

    monkeypatch.setattr(service.loaded.weights, "publish", full)
    wanted = {"publish_every": 1, "steps": 500, "checkpoint_every": 1}
    job = ended(client, begin(client, **wanted))
    assert job["status"] == "failed" and job["problem"]["error"]["code"] == "disk_full"
    assert [step for _, step, _ in sets(client)] == [1] and not list(service.loaded.weights.root.glob(".turn-*"))
    (unfinished,) = service.loaded.weights.root.glob(".unfinished-*")
    left = sorted(path.name for path in unfinished.iterdir())
    time.sleep(0.3)
    assert sorted(path.name for path in unfinished.iterdir()) == left  # nobody is at work in it
    monkeypatch.undo()
    again = begin(client, **wanted)
    with client.stream("GET", f"/v1/jobs/{again}/events") as stream:
        next(line for line in stream.iter_lines() if "better@4" in line)
    client.delete(f"/v1/jobs/{again}")
    assert ended(client, again)["status"] == "cancelled" and [step for _, step, _ in sets(client)][:4] == [1, 2, 3, 4]


def test_publishing_holds_up_neither_the_tuning_nor_requests(client, service, monkeypatch):
    """While somebody activates a set for long, the compute thread goes on."""
    begun, go = threading.Event(), threading.Event()

    def slow(weights):
        begun.set()
        go.wait(30)

    monkeypatch.setattr(service.loaded.runner, "_activate", slow)
    job = begin(client, publish_every=1, steps=4, activate=True)
    begun.wait(30)
    image(client)
    deadline = time.monotonic() + 30
    while client.get(f"/v1/jobs/{job}").json()["step"] < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert client.get(f"/v1/jobs/{job}").json()["step"] == 4 and [version for version, *_ in sets(client)] == [1]
    go.set()
    assert ended(client, job)["status"] == "succeeded" and len(sets(client)) == 4
