"""The adaptation "lora" as a job of the service: published, hot-swapped, cancelled and taken up again."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from generator_service.service import Service
from tests.generator_service.tiny_sd import save_checkpoint
from tests.generator_service.tiny_service import make_service, served, started

# raised inside diffusers' samplers, for torch and numpy 2 together
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
ADAPT = {"type": "adapt", "method": "lora", "name": "pets", "steps": 4, "batch_size": 2, "learning_rate": 0.05}
ASK = {"prompt": "a photo of alpha", "seed": 1, "num_inference_steps": 3}


@pytest.fixture
def service(dataset_root, tmp_path) -> Iterator[Service]:
    checkpoint = str(save_checkpoint(tmp_path / "sd"))
    settings = {"stable_diffusion": {"checkpoint": checkpoint, "device": "cpu"}, "dataset": {"root": dataset_root}}
    with started(make_service(tmp_path, backend="stable_diffusion", **settings)) as service:
        yield service


@pytest.fixture
def client(service) -> Iterator[httpx.Client]:
    with served(service) as url, httpx.Client(base_url=url, timeout=60.0) as client:
        yield client


def ended(client: httpx.Client, job: str) -> dict:
    client.get(f"/v1/jobs/{job}/events")
    return client.get(f"/v1/jobs/{job}").json()


def image(client: httpx.Client, **fields) -> str:
    answer = client.post("/v1/images/generations", json=ASK | fields)
    assert answer.status_code == 200, answer.text
    return answer.json()["data"][0]["b64_json"]


def test_a_job_makes_weights_that_are_swapped_in(client, service):
    before = image(client)
    options = {"rank": 2, "validation": 0.25, "validate_every": 2}
    job = ended(client, client.post("/v1/jobs", json=ADAPT | {"lora": options, "activate": True}).json()["id"])
    assert (job["status"], job["step"]) == ("succeeded", 4), job["problem"]
    made = job["result"]
    assert (made["kind"], made["base"], made["active"]) == ("lora", "base@1", True)
    assert made["classes"] == ["alpha", "beta", "gamma"] and made["metadata"]["rank"] == 2
    assert [step for step, _ in made["metadata"]["held_out_losses"]] == [0, 2, 4]
    weights = service.loaded.weights.resolve("pets@1")
    service.loaded.weights.verify(weights)
    assert sorted(path.name for path in (weights.folder / "validation").iterdir())[-1] == "step-000004.png"
    assert image(client) != before
    assert image(client, lora_scale=0.0) == image(client, model="base") == before


def test_a_cancelled_job_is_taken_up_again(client, service):
    """The second time it begins at the last checkpoint, and the service serves the base meanwhile and in between."""
    before = image(client)
    wanted = ADAPT | {"steps": 400, "lora": {"validation": 0.0, "checkpoint_every": 1}}
    job = client.post("/v1/jobs", json=wanted).json()["id"]
    with client.stream("GET", f"/v1/jobs/{job}/events") as events:
        for line in events.iter_lines():
            if '"step":2' in line.replace(" ", ""):
                break
    client.delete(f"/v1/jobs/{job}")
    assert ended(client, job)["status"] == "cancelled" and image(client) == before
    (checkpoint,) = (service.loaded.weights.root).glob(".unfinished-*/checkpoint-*.pt")
    reached = int(checkpoint.name.split("-")[1])
    again = client.post("/v1/jobs", json=wanted).json()["id"]
    with client.stream("GET", f"/v1/jobs/{again}/events") as events:
        first = next(line for line in events.iter_lines() if '"loss"' in line)
    client.delete(f"/v1/jobs/{again}")
    assert f'"step":{reached + 1},' in first.replace(" ", "")
