"""The service on a Stable Diffusion checkpoint: what a request says is what the backend is asked for."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import numpy as np
import pytest
import torch

from generator_service.backends.interface import Row, Sampling
from protocol.codec import image_from_base64, image_to_base64
from tests.generator_service.tiny_sd import WIDTH, full, lora_set, open_backend, save_checkpoint, save_lora
from tests.generator_service.tiny_service import make_service, served, started

# raised inside diffusers' samplers, for torch and numpy 2 together
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

MEANS = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
CLASSES = ["alpha", "beta", "gamma"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def backend(folder):
    return open_backend(folder)


@pytest.fixture(scope="module")
def client(folder, backend, dataset_root, tmp_path_factory) -> Iterator[httpx.Client]:
    root = tmp_path_factory.mktemp("service")
    settings = {"stable_diffusion": {"checkpoint": str(folder), "device": "cpu"}, "dataset": {"root": dataset_root}}
    service = make_service(root, backend="stable_diffusion", **settings)
    with started(service), served(service) as url, httpx.Client(base_url=url, timeout=60.0) as client:
        weights = service.loaded.weights
        with weights.staging() as staged:
            save_lora(staged, backend.checkpoint(full(backend)).unet, 1, MEANS)
            weights.publish(staged, "pets", weights.base, "lora", CLASSES, {"visual": "class"})
        client.weights = weights
        yield client


def ask(client: httpx.Client, **body) -> np.ndarray:
    answer = client.post("/v1/images/generations", json={"seed": 3, "num_inference_steps": 4} | body)
    assert answer.status_code == 200, answer.text
    return np.stack([image_from_base64(image["b64_json"], max_pixels=1000) for image in answer.json()["data"]])


def test_everything_a_request_says_reaches_the_backend(client, backend):
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    got = ask(
        client,
        prompt="an owl",
        negative_prompt="blurry",
        guidance_scale=5.0,
        scheduler="euler-a",
        image=image_to_base64(picture),
        strength=0.5,
        n=2,
    )
    rows = [Row(seed, None, 5.0, "an owl", "blurry", picture) for seed in (3, 4)]
    np.testing.assert_array_equal(got, backend.generate(full(backend), rows, Sampling(4, "euler-a", 0.5, guided=True)))


def test_a_lora_with_visual_tokens(client, backend):
    weights = lora_set(full(backend), client.weights.resolve("pets").folder, tuple(CLASSES), "class")
    for scale in (1.0, 0.5):
        got = ask(client, model="pets", prompt="an owl", class_label="gamma", lora_scale=scale)
        sampling = Sampling(4, "ddim", guided=True, lora_scale=scale)
        np.testing.assert_array_equal(got, backend.generate(weights, [Row(3, 2, 2.0, "an owl")], sampling))


def test_what_cannot_be_had_is_refused(client):
    for body, param in (
        ({"prompt": "x", "lora_scale": 0.5}, "lora_scale"),
        ({"prompt": "x", "class_label": "alpha"}, "class_label"),
        ({"prompt": "x", "size": "512x512"}, "size"),
        ({"prompt": " ".join("x" * 76)}, "prompt"),  # and begin and end
        ({"prompt": "x", "negative_prompt": " ".join("x" * 76)}, "negative_prompt"),
        ({"prompt": "x", "negative_prompt": "blurry", "guidance_scale": 1.0}, "negative_prompt"),
    ):
        answer = client.post("/v1/images/generations", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, param)
    ask(client, prompt=" ".join("x" * 75))
    job = {"type": "adapt", "name": "mine", "method": "cold_start"}
    assert "use lora" in client.post("/v1/jobs", json=job).json()["detail"]
