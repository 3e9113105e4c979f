"""The service as a whole on the real DiT: adaptation, hot swap, corrupt weights, near-copies."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from generator_service import registry
from generator_service.backends.interface import Progress
from generator_service.service import Service
from protocol import broker, codec
from protocol.dataset import Dataset, DatasetConfig
from protocol.errors import ConfigError, NotReady, TrainingDiverged, WeightsCorrupt
from tests.generator_service.tiny_service import make_service, served, started

IMAGES = "/v1/images/generations"
ADAPT = {"type": "adapt", "name": "noise", "steps": 3, "batch_size": 4, "learning_rate": 0.1}


@pytest.fixture
def http(dit_service: Service) -> Iterator[httpx.Client]:
    with served(dit_service) as url, httpx.Client(base_url=url) as client:
        yield client


def adapt(http: httpx.Client, **fields) -> dict:
    """Run an adaptation to its end and return the job."""
    job = http.post("/v1/jobs", json=ADAPT | fields).json()["id"]
    http.get(f"/v1/jobs/{job}/events")
    return http.get(f"/v1/jobs/{job}").json()


def pixels(response: httpx.Response) -> np.ndarray:
    assert response.status_code == 200, response.text
    return codec.image_from_base64(response.json()["data"][0]["b64_json"])


def test_an_adaptation_makes_weights_that_are_swapped_in_and_stamped(http: httpx.Client):
    ask = {"prompt": "alpha", "seed": 1, "guidance_scale": 1.0}
    before = http.post(IMAGES, json=ask)
    job = adapt(http, activate=True)
    assert (job["status"], job["step"]) == ("succeeded", 3)
    made = job["result"]
    assert (made["name"], made["version"], made["kind"], made["base"], made["active"]) == (
        "noise",
        1,
        "class_embedding",
        "base@1",
        True,
    )
    assert made["classes"] == ["alpha", "beta", "gamma"] and np.isfinite(made["metadata"]["loss"])
    after = http.post(IMAGES, json=ask)
    ref = {key: made[key] for key in ("name", "version", "digest")}
    assert (before.json()["weights"]["name"], after.json()["weights"]) == ("base", ref)
    assert np.any(pixels(before) != pixels(after))
    sample = http.get(f"/v1/samples/{after.json()['data'][0]['sample_id']}").json()
    assert sample["weights"] == ref
    np.testing.assert_array_equal(pixels(http.post(IMAGES, json=ask | {"model": "base"})), pixels(before))


def test_weights_can_be_activated_by_version_and_back(http: httpx.Client):
    adapt(http)
    adapt(http, seed=1)
    listed = http.get("/v1/weights").json()
    assert [(entry["name"], entry["version"]) for entry in listed["data"]] == [("base", 1), ("noise", 1), ("noise", 2)]
    assert listed["active"]["name"] == "base"
    for name, version, expected in (("noise", None, 2), ("noise", 1, 1), ("base", None, 1)):
        answer = http.post(f"/v1/weights/{name}/activate", json={"version": version})
        assert answer.status_code == 200 and answer.json()["active"]
        assert http.get("/v1/weights").json()["active"]["version"] == answer.json()["version"] == expected


def test_the_loss_goes_out_as_events_and_metrics(http: httpx.Client):
    job = http.post("/v1/jobs", json=ADAPT).json()["id"]
    text = http.get(f"/v1/jobs/{job}/events").text
    assert text.count("event: progress") == 3 and text.count('"loss":') >= 3
    page = http.get("/metrics").text
    assert "onthefly_adaptation_steps_total 3.0" in page
    assert "onthefly_adaptation_loss 0.0" not in page


def diverging(backend, base, real, classes, job, folder, unfinished):
    (folder / "half.safetensors").write_bytes(b"half")
    yield Progress(1, 2, 0.5)
    raise TrainingDiverged("the loss is NaN: lower learning_rate")


def test_an_adaptation_that_diverges_fails_with_its_own_error_and_leaves_no_weights(http, dit_service, monkeypatch):
    monkeypatch.setitem(registry.ADAPTATIONS, "cold_start", f"{__name__}:diverging")
    job = adapt(http)
    assert (job["status"], job["problem"]["error"]["code"]) == ("failed", "training_diverged")
    assert [entry["name"] for entry in http.get("/v1/weights").json()["data"]] == ["base"]
    assert list(dit_service.config.weights_dir.iterdir()) == []


def test_corrupt_weights_are_refused_by_file_and_the_active_ones_stay(http: httpx.Client, dit_service: Service):
    adapt(http)
    folder = dit_service.config.weights_dir / "noise" / "1"
    tensors = next(path for path in folder.iterdir() if path.suffix == ".safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-1])
    for response in (
        http.post("/v1/weights/noise/activate"),
        http.post(IMAGES, json={"prompt": "alpha", "model": "noise"}),
    ):
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "weights_corrupt" and tensors.name in response.json()["detail"]
    assert http.get("/v1/weights").json()["active"]["name"] == "base"
    assert http.post(IMAGES, json={"prompt": "alpha"}).status_code == 200


def test_active_weights_survive_a_restart(tmp_path: Path, dit_settings: dict):
    with (
        started(make_service(tmp_path, **dit_settings)) as service,
        served(service) as url,
        httpx.Client(base_url=url) as client,
    ):
        made = adapt(client, activate=True)["result"]
    with started(make_service(tmp_path, **dit_settings)) as again:
        assert again.loaded.weights.active().ref.digest == made["digest"]


def test_every_image_is_checked_against_the_real_ones(http: httpx.Client, dataset_root: Path):
    dataset = Dataset.open(DatasetConfig(root=dataset_root))
    copy = {"prompt": "alpha", "image": codec.image_to_base64(dataset.image(5)), "strength": 0.0}
    copied, fresh = http.post(IMAGES, json=copy).json()["data"][0], http.post(IMAGES, json={"prompt": "alpha"}).json()
    assert copied["near_copy"] and not fresh["data"][0]["near_copy"]
    sample = http.get(f"/v1/samples/{copied['sample_id']}").json()
    assert (sample["nearest_real"], sample["nearest_distance"]) == (dataset.samples[5].id, 0.0)
    other = http.get(f"/v1/samples/{fresh['data'][0]['sample_id']}").json()
    assert other["nearest_distance"] > 0.02


def test_a_corrupt_checkpoint_fails_the_start_by_name(tmp_path: Path, checkpoint: Path):
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    tensors = next((broken / "transformer").glob("*.safetensors"))
    tensors.write_bytes(tensors.read_bytes()[: -len(tensors.read_bytes()) // 2])
    service = make_service(tmp_path, dit={"checkpoint": str(broken), "device": "cpu"})
    service.start()
    assert isinstance(service.engine.ready.exception(), WeightsCorrupt)
    with pytest.raises(NotReady, match="could not be loaded"):
        service.engine.check_ready()
    service.stop()


@pytest.mark.parametrize("table", [{"checkpoint": "/nope"}, {"chekpoint": "embedded"}], ids=str)
def test_wrong_backend_settings_are_config_errors(tmp_path: Path, table: dict):
    service = make_service(tmp_path, dit=table)
    service.start()
    assert isinstance(service.engine.ready.exception(), ConfigError)
    service.stop()


def test_the_same_adaptation_of_the_same_images_is_done_once(http: httpx.Client):
    versions = [adapt(http)["result"]["version"], adapt(http)["result"]["version"]]
    versions += [adapt(http, seed=1)["result"]["version"], adapt(http, again=True)["result"]["version"]]
    assert versions == [1, 1, 2, 3]


def test_no_name_of_weights_reaches_the_services_own_files(http: httpx.Client):
    assert adapt(http, name="active.json", activate=True)["status"] == "succeeded"
    assert http.post(IMAGES, json={"prompt": "alpha"}).status_code == 200
    assert http.get("/v1/weights").json()["active"]["name"] == "active.json"


@pytest.mark.parametrize("content", ["{", "[]", '{"name": "base"}', '{"name": "gone", "version": 1}'])
def test_a_damaged_choice_of_weights_is_told(
    dit_service: Service, http: httpx.Client, dit_settings: dict, content: str
):
    """By the replica that goes on with what it serves, and by one that cannot start with it."""
    (dit_service.config.weights_dir / ".active.json").write_text(content)
    while (replica := http.get("/v1/replicas").json()["data"][0])["problem"] is None:
        time.sleep(0.02)
    assert ".active.json" in replica["problem"] and replica["weights"]["name"] == "base"
    assert http.post(IMAGES, json={"prompt": "alpha"}).status_code == 200
    assert http.post("/v1/weights/base/activate").status_code == 200
    assert http.get("/v1/replicas").json()["data"][0]["problem"] is None
    (dit_service.config.weights_dir / ".active.json").write_text(content)
    again = make_service(dit_service.config.samples_dir, **dit_settings, weights_dir=dit_service.config.weights_dir)
    again.start()
    assert isinstance(again.engine.ready.exception(timeout=30), WeightsCorrupt)
    again.stop()


def test_stopping_while_the_model_loads(tmp_path: Path, dit_settings: dict, queue_url: str):
    service = make_service(tmp_path, queue_url, **dit_settings)
    service.start()
    stopper = threading.Thread(target=service.stop, daemon=True)
    stopper.start()
    stopper.join(60)
    assert not stopper.is_alive()


def test_a_broker_that_does_not_answer_holds_nobody_up(
    tmp_path: Path, dit_settings: dict, monkeypatch: pytest.MonkeyPatch
):
    """It takes the connection and says nothing."""
    monkeypatch.setattr(broker, "PROMPT_TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0), backlog=50) as silent:
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}/0"
        service = make_service(tmp_path, url, **dit_settings)
        with started(service), served(service) as address, httpx.Client(base_url=address, timeout=30) as client:
            assert client.get("/metrics").status_code == 200
            assert client.post(IMAGES, json={"prompt": "alpha"}).status_code == 200
            entry = Dataset.open(DatasetConfig(**dit_settings["dataset"])).samples[0]
            marginal = {"sample_id": entry.id, "label": 0, "class_name": entry.class_name, "score": 0.1}
            feedback = {"run": "r", "feedback": 0, "model_version": 0, "samples": [marginal]}
            answer = client.post("/v1/feedback", json=feedback)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "broker_unavailable")


def test_an_empty_key_is_no_key(tmp_path: Path, dit_settings: dict, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ONTHEFLY_API_KEY", "")
    with started(make_service(tmp_path, **dit_settings)) as service, served(service) as url:
        assert httpx.get(f"{url}/v1/jobs").status_code == 200
