"""Learning a sampling policy as a job of the service: followed, published, served, cancelled, gone on with, refused."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pytest

from agent import cli
from generator_service.registry import FACE_READERS
from generator_service.service import Service
from protocol import codec
from tests.expressions import world
from tests.generator_service import tiny_t2v
from tests.generator_service.rl.clip_place import COUNTS, READER, SIZE, SMALL
from tests.generator_service.test_app import events
from tests.generator_service.tiny_service import make_service, served, started

JOB = {"type": "policy", **json.loads(json.dumps(SMALL)), "base": "base"}
FACES = {"reader": "shades", "min_presence": 0.0, "min_side": 16, "min_sharpness": 0.0, "min_contrast": 0.0}


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    place = tmp_path_factory.mktemp("place")
    world.write_dataset(place / "clips", seed=0, size=SIZE, frames=3, counts=COUNTS, split=None, subjects=4)
    checkpoint = tiny_t2v.save_checkpoint(place / "t2v")
    return {
        "backend": "ti2v",
        "ti2v": {"checkpoint": str(checkpoint), "device": "cpu", "window": 2},
        "dataset": {"root": place / "clips", "layout": "clips"},
        "faces": FACES | {"folder": place / "faces"},
        "threads": 1,
    }


@pytest.fixture(scope="module")
def service(tmp_path_factory, settings) -> Iterator[Service]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FACE_READERS, "shades", READER)
        with started(make_service(tmp_path_factory.mktemp("service"), **settings)) as service:
            yield service


@pytest.fixture(scope="module")
def url(service) -> Iterator[str]:
    with served(service) as url:
        yield url


@pytest.fixture
def client(url) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60.0) as client:
        yield client


def begin(client: httpx.Client, **fields) -> str:
    answer = client.post("/v1/jobs", json=JOB | fields)
    assert answer.status_code == 202, answer.text
    return answer.json()["id"]


def told(client: httpx.Client, job: str) -> list[dict]:
    return [event.data for event in events(client, job) if event.kind == "progress"]


def ended(client: httpx.Client, job: str) -> dict:
    events(client, job)
    return client.get(f"/v1/jobs/{job}").json()


def video(client: httpx.Client, **fields) -> dict:
    picture = codec.image_to_base64(world.draw("neutral", world.people("x", 0, 1)[0], seed=1, size=SIZE).frames[0])
    request = {"prompt": "she smiles", "image": picture, "seed": 3, "num_frames": 2} | fields
    job = client.post("/v1/jobs", json={"type": "video", "request": request}).json()["id"]
    return ended(client, job)["result"]


def test_it_is_followed_published_and_served(client, service):
    job = begin(client)
    steps = [data for data in told(client, job) if "loss" in data]
    assert [data["step"] for data in steps] == [1, 2, 3, 4] and "validation" in steps[-1]
    result = ended(client, job)["result"]
    assert (result["kind"], result["base"], result["version"], result["active"]) == ("policy", "base@1", 1, False)
    assert result["metadata"]["step"] == 4 and result["metadata"]["validation"]["states"] >= 1
    service.loaded.weights.verify(service.loaded.weights.resolve("chooser@1"))
    assert list(service.loaded.weights.root.glob(".unfinished-*")) == []
    clip = video(client, model="chooser")
    assert clip["policy"] and clip["data"][0]["steps"] in (1, 2) and clip["data"][0]["guidance"]["b"] == 2.0
    assert clip["frames"] == 2 and not video(client, model="chooser", num_inference_steps=1)["policy"]


def test_an_equal_job_is_done_once_and_an_active_policy_is_no_base(client):
    first = ended(client, begin(client))["result"]
    assert ended(client, begin(client))["result"] == first
    active = ended(client, begin(client, name="serving", activate=True))["result"]
    assert active["active"]
    again = ended(client, begin(client, name="serving", base=None, activate=True, seed=1))["result"]
    assert (again["base"], again["version"]) == ("base@1", 2)
    client.post("/v1/weights/base/activate")


def test_a_random_policy_is_served_too(client):
    result = ended(client, begin(client, name="drawing", method="random"))["result"]
    assert result["metadata"]["method"] == "random" and result["kind"] == "policy"
    assert video(client, model="drawing")["data"][0]["steps"] in (1, 2)


def test_cancelled_it_goes_on_from_its_checkpoint(client):
    fields = {"name": "long", "steps": 30, "checkpoint_every": 1, "validate_every": 100}
    job = begin(client, **fields)
    with client.stream("GET", f"/v1/jobs/{job}/events") as stream:
        next(line for line in stream.iter_lines() if '"step": 3' in line or '"step":3' in line)
    client.delete(f"/v1/jobs/{job}")
    assert ended(client, job)["status"] == "cancelled"
    steps = [data["step"] for data in told(client, begin(client, **fields)) if "loss" in data]
    assert steps[0] > 3 and steps[-1] == 30


def test_the_command_line_begins_it(url, capsys):
    options = [f"{key}={json.dumps(value)}" for key, value in SMALL.items() if key not in ("name", "steps", "actions")]
    options += ["actions.steps=[1]", "actions.pairs=[[2.0, 2.0], [3.0, 2.0]]"]
    sets = [part for option in options for part in ("--set", option)]
    assert cli.main(["policy", "said", "--base", "base", "--steps", "2", "--url", url, *sets]) == 0
    assert "learnt a policy: weights said@1" in capsys.readouterr().err


def test_what_cannot_be_learnt_is_refused(client):
    wrong = [
        ({"rewards": {"beauty": {"weight": 1.0}}}, "no reward 'beauty' here: use amplitude, face, quality, steps"),
        ({"rewards": {"face": {"weight": 1.0, "options": {"x": 1.0}}}}, "has no option"),
        ({"base": "nobody"}, "no weights"),
    ]
    for fields, words in wrong:
        answer = client.post("/v1/jobs", json=JOB | fields)
        assert answer.status_code in (404, 422) and words in answer.json()["detail"]


@pytest.mark.parametrize(
    ("missing", "words"), [("dataset", "generator.dataset"), ("faces", "[generator.faces]")], ids=["dataset", "faces"]
)
def test_what_the_service_lacks_is_named(tmp_path, settings, monkeypatch, missing, words):
    monkeypatch.setitem(FACE_READERS, "shades", READER)
    given = {name: value for name, value in settings.items() if name != missing}
    with started(make_service(tmp_path, **given)) as service, served(service) as url:
        answer = httpx.post(f"{url}/v1/jobs", json=JOB)
        assert answer.status_code == 422 and words in answer.json()["detail"]


def test_a_service_of_images_has_no_clips_to_sample(tmp_path, dit_settings):
    with started(make_service(tmp_path, **dit_settings)) as service, served(service) as url:
        answer = httpx.post(f"{url}/v1/jobs", json=JOB)
        assert answer.status_code == 422 and "makes no clips" in answer.json()["detail"]
