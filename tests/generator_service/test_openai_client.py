"""An unmodified `openai` client over real HTTP, and the pixels a seed gives, on the real DiT backend."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import pytest

from generator_service.service import Service
from protocol import codec
from tests.generator_service.tiny_service import make_service, served, started


@pytest.fixture
def service(tmp_path: Path, dit_settings: dict) -> Iterator[Service]:
    """Batches fill up for a second, so that requests sent together share one."""
    with started(make_service(tmp_path, **dit_settings | {"batch_window_ms": 1000.0, "max_batch": 4})) as service:
        yield service


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    with served(service) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def picture(response) -> np.ndarray:
    return codec.image_from_bytes(base64.b64decode(response.data[0].b64_json))


def test_images_generate_works_as_documented(client: openai.OpenAI):
    response = client.images.generate(
        model="base", prompt="beta", n=4, size="8x8", response_format="b64_json", extra_body={"seed": 11}
    )
    assert len({image.b64_json for image in response.data}) == 4
    assert (response.size, response.output_format) == ("8x8", "png")
    assert [image.seed for image in response.data] == [11, 12, 13, 14]
    assert picture(response).shape == (8, 8, 3)


def test_a_refused_field_reaches_the_client_as_its_own_error(client: openai.OpenAI):
    with pytest.raises(openai.UnprocessableEntityError) as error:
        client.images.generate(prompt="beta", style="vivid")
    assert (error.value.code, error.value.param, error.value.type) == (
        "unsupported_field",
        "style",
        "invalid_request_error",
    )
    with pytest.raises(openai.NotFoundError) as unknown:
        client.images.generate(prompt="beta", model="dall-e-3")
    assert unknown.value.code == "unknown_weights"


def test_a_seed_gives_the_same_image_beside_any_batch_mates(client: openai.OpenAI, service: Service):
    """Bit-equal at equal batch shape; beside other shapes within one grey level, as float rounding differs."""

    def ask(seed: int, label: str, found: dict) -> None:
        found[seed] = picture(client.images.generate(prompt=label, extra_body={"seed": seed}))

    def together(*wanted: tuple[int, str]) -> dict[int, np.ndarray]:
        found: dict[int, np.ndarray] = {}
        threads = [threading.Thread(target=ask, args=(seed, label, found)) for seed, label in wanted]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        return found

    first = together((1, "alpha"), (2, "beta"), (3, "gamma"), (4, "alpha"))
    second = together((9, "gamma"), (2, "beta"), (8, "alpha"), (7, "beta"))
    assert "onthefly_batch_rows_count 2.0" in service.metrics().decode()  # they did share
    np.testing.assert_array_equal(first[2], second[2])
    alone = together((2, "beta"))[2]
    assert np.abs(alone.astype(int) - first[2].astype(int)).max() <= 1
    assert np.abs(first[1].astype(int) - first[4].astype(int)).max() > 1


def test_an_init_image_at_strength_zero_comes_back_as_it_was(client: openai.OpenAI):
    image = np.repeat(np.arange(64, dtype=np.uint8).reshape(8, 8, 1) * 4, 3, axis=2)
    response = client.images.generate(
        prompt="alpha", extra_body={"image": codec.image_to_base64(image), "strength": 0.0}
    )
    np.testing.assert_array_equal(picture(response), image)
