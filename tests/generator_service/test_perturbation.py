"""Prompts of work units: perturbed by who makes them, from feedback to samples, on a real broker."""

from __future__ import annotations

import threading
from pathlib import Path

import httpx
import pytest

from agent.captions import Perturber, Subject
from agent.settings import AgentConfig
from generator_service import registry
from generator_service.backends.interface import Abilities
from generator_service.perturbation import perturbed
from generator_service.service import Service
from protocol.bus import Bus, QueueConfig
from protocol.messages import FeedbackAccepted, WeightsRef
from tests.agent.fake_endpoint import Reply, endpoint, said
from tests.generator_service.conftest import scripted
from tests.generator_service.scripted import Config as Config
from tests.generator_service.scripted import ScriptedBackend
from tests.generator_service.test_queue_worker import RUN, batches, work_row, work_unit
from tests.generator_service.test_queue_worker import bus as bus
from tests.generator_service.tiny_service import make_service, served, started

WEIGHTS = WeightsRef(name="base", version=1, digest="x")


class TextBackend(ScriptedBackend):
    """Conditioned on text, and any class."""

    name = "text"
    can = Abilities("text", schedulers=("ddim", "dpm-solver"), adaptations=())
    classes = ()


@pytest.fixture
def text_settings(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    monkeypatch.setitem(registry.BACKENDS, "text", f"{__name__}:TextBackend")
    return {"backend": "text", "text": {"checkpoint": checkpoint}}


def served_by(folder: Path, queue_url: str, settings: dict, **agent) -> Service:
    config = make_service(folder, queue_url, **settings).config
    chosen = {"steps": 1, "images_per_sample": 2, "unit_size": 4, "init": False}
    return Service(config, AgentConfig.model_validate(chosen | agent), QueueConfig(url=queue_url, lease_idle_s=1.0))


def feedback(number: int, *captions: str | None) -> dict:
    samples = [
        {"sample_id": f"s{index}", "label": 0, "class_name": "beagle", "score": 0.1, "caption": caption}
        for index, caption in enumerate(captions)
    ]
    return {"run": RUN, "feedback": number, "model_version": 7, "samples": samples}


# ---------------------------------------------------------------- one unit


def test_row_i_gets_version_i():
    perturb = Perturber(None, "a {class_name} that is {caption}")
    rows = [
        work_row(n, source_id=source, index=n, caption=caption)
        for source, caption in (("a", "red"), ("b", None))
        for n in (0, 1, 2)
    ]
    final = perturbed(work_unit(0, WEIGHTS, *rows, versions=3), perturb, {})
    made = perturb([Subject("alpha", "red"), Subject("alpha", None)], 3)
    expected = [f"a alpha that is {text}" for subject in made for text in made[subject].texts]
    assert [row.prompt for row in final.rows] == expected and len(set(expected)) == 6
    assert {row.prompt_by for row in final.rows} == {"template"}
    same = {"prompt", "prompt_by"}
    assert [row.model_dump(exclude=same) for row in final.rows] == [row.model_dump(exclude=same) for row in rows]


def test_classes_that_are_short_of_more_images_than_versions_use_them_again():
    rows = [work_row(n, index=n) for n in range(5)]
    prompts = [
        row.prompt for row in perturbed(work_unit(0, WEIGHTS, *rows, versions=2), Perturber(None, "{caption}"), {}).rows
    ]
    assert prompts[:2] == prompts[2:4] and prompts[4] == prompts[0] != prompts[1]


def test_prompts_that_are_final_stay():
    unit = work_unit(0, WEIGHTS, work_row(0), work_row(1))
    assert perturbed(unit, Perturber(None, "{caption}"), {}) is unit
    done = work_row(0, prompt="as it is", prompt_by="llama")
    final = perturbed(work_unit(0, WEIGHTS, done, work_row(1), versions=2), Perturber(None, "{caption}"), {})
    assert final.rows[0] == done and final.rows[1].prompt_by == "template"


# ---------------------------------------------------------------- the whole way


def test_feedback_is_answered_while_the_language_model_thinks(
    tmp_path: Path, text_settings: dict, queue_url: str, bus: Bus
):
    thought = threading.Event()

    def answer(body: dict) -> Reply:
        thought.wait()
        return said("1. a beagle asleep\n2. a beagle on grass")

    with endpoint(answer) as model:
        openai = {"url": model.url, "model": "llama"}
        service = served_by(tmp_path, queue_url, text_settings, perturb="openai", openai=openai)
        with started(service), served(service) as url, httpx.Client(base_url=url) as http:
            reply = http.post("/v1/feedback", json=feedback(0, "a beagle on a sofa", "a beagle at a lake"))
            assert FeedbackAccepted.model_validate_json(reply.content).samples == 4
            thought.set()
            (batch,) = batches(bus, 1)
            scenes = ["a beagle asleep", "a beagle on grass"]
            assert [sample.prompt for sample in batch.samples] == [
                f"a photo of beagle, which is {s}" for s in scenes * 2
            ]
            assert {sample.prompt_by for sample in batch.samples} == {"llama"}
            assert http.get(f"/v1/samples/{batch.samples[0].id}").json()["prompt_by"] == "llama"
            metrics = http.get("/metrics").text
            assert 'onthefly_captions_total{by="model"} 4.0' in metrics
            http.post("/v1/feedback", json=feedback(1, "a beagle on a sofa"))
            batches(bus, 1)
            assert 'onthefly_captions_total{by="cache"} 2.0' in http.get("/metrics").text
        assert len(model.bodies) == 2  # both captions of the unit at once, and never again


def test_one_unit_is_perturbed_while_another_is_denoised(tmp_path: Path, text_settings: dict, queue_url: str, bus: Bus):
    second = threading.Event()

    def answer(body: dict) -> Reply:
        if "a second beagle" in body["messages"][1]["content"]:
            second.set()
        return said("1. a beagle asleep\n2. a beagle on grass")

    with endpoint(answer) as model:
        openai = {"url": model.url, "model": "llama"}
        settings = text_settings | {"queue_threads": 2}
        service = served_by(tmp_path, queue_url, settings, perturb="openai", openai=openai, unit_size=2)
        with started(service), served(service) as url:
            backend = scripted(service)
            backend.hold()
            captions = ["a first beagle", "a second beagle"]
            httpx.post(f"{url}/v1/feedback", json=feedback(0, *captions)).raise_for_status()
            backend.inside.wait()  # the first unit is being denoised, and stays so
            second.wait()
            backend.release()
            assert [len(batch.samples) for batch in batches(bus, 2)] == [2, 2]


def test_another_replica_makes_the_same_prompts(tmp_path: Path, text_settings: dict, queue_url: str, bus: Bus):
    def prompts(number: int, scenes: str) -> list[str]:
        with endpoint(lambda body: said(scenes)) as model:
            openai = {"url": model.url, "model": "llama"}
            service = served_by(tmp_path / str(number), queue_url, text_settings, perturb="openai", openai=openai)
            with started(service), served(service) as url:
                httpx.post(f"{url}/v1/feedback", json=feedback(number, "a beagle on a sofa")).raise_for_status()
                return [sample.prompt for sample in batches(bus, 1)[0].samples]

    assert prompts(0, "1. asleep\n2. awake") == prompts(1, "1. running\n2. barking")


def test_without_an_endpoint_the_template_takes_over(
    tmp_path: Path, text_settings: dict, queue_url: str, bus: Bus, caplog: pytest.LogCaptureFixture
):
    openai = {"url": "http://127.0.0.1:1/v1", "retries": 0}
    service = served_by(tmp_path, queue_url, text_settings, perturb="openai", openai=openai)
    with started(service), served(service) as url:
        for number in range(2):
            httpx.post(
                f"{url}/v1/feedback", json=feedback(number, f"scene {number}", f"another {number}")
            ).raise_for_status()
            samples = batches(bus, 1)[0].samples
            assert len({sample.prompt for sample in samples}) == 4
            assert {sample.prompt_by for sample in samples} == {"template"}
        assert 'onthefly_captions_total{by="template"} 8.0' in httpx.get(f"{url}/metrics").text
    assert sum("perturbed by the template" in message for message in caplog.messages) == 1


@pytest.mark.parametrize(
    ("backend", "perturb", "by"),
    [("text", "none", None), ("scripted", "template", None), ("text", "template", "template")],
)
def test_only_prompts_that_are_read_are_perturbed(
    tmp_path: Path, text_settings: dict, scripted_settings: dict, queue_url: str, bus: Bus, backend, perturb, by
):
    settings = text_settings if backend == "text" else scripted_settings
    service = served_by(tmp_path, queue_url, settings, perturb=perturb)
    asked = feedback(0, "asleep")
    asked["samples"][0]["class_name"] = "alpha"
    with started(service), served(service) as url:
        httpx.post(f"{url}/v1/feedback", json=asked).raise_for_status()
        samples = batches(bus, 1)[0].samples
    assert {sample.prompt_by for sample in samples} == {by}
    assert ({sample.prompt for sample in samples} == {"a photo of alpha, which is asleep"}) == (by is None)
