"""The service on a text-and-image-to-video checkpoint: what a request says is what the backend is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from generator_service.backends.interface import Row, Sampling, WeightSet
from generator_service.real_images import resized
from generator_service.rl.sampling_policy import RandomPolicy, SamplingPolicy, Sizes, write_policy
from generator_service.service import Service
from protocol import clips, codec
from protocol.messages import Job
from protocol.policy import ActionSpace
from protocol.video import GuidanceCurve, VideosResponse
from tests.generator_service.test_app import events, problem
from tests.generator_service.test_clip_units import write_clips
from tests.generator_service.tiny_sd import WIDTH
from tests.generator_service.tiny_service import make_service, served, started
from tests.generator_service.tiny_t2v import save_checkpoint

# raised inside diffusers' samplers, for torch and numpy 2 together
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

SIZE, FRAMES = 16, 3
FIRST = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
ACTIONS = ActionSpace(steps=[2, 3], pairs=[(2.0, 2.0), (3.0, 2.0)], minimum=1.0, maximum=4.0)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """With a dataset of clips, and weights that have a policy."""
    root = tmp_path_factory.mktemp("service")
    checkpoint = save_checkpoint(root / "checkpoint", size=SIZE, channels=(8, 16))
    settings = {
        "backend": "ti2v",
        "ti2v": {"checkpoint": str(checkpoint), "device": "cpu", "window": 3},
        "dataset": {"root": write_clips(root / "data"), "layout": "clips"},
        "videos": {"frames": FRAMES, "steps": 2, "guidance_scale": 3.0},
    }
    with started(make_service(root, **settings)) as service:
        publish(service)
        yield service


@pytest.fixture(scope="module")
def http(service: Service) -> Iterator[httpx.Client]:
    with served(service) as url, httpx.Client(base_url=url, timeout=60.0) as client:
        yield client


def publish(service: Service) -> None:
    """A set with a policy that draws its action by the state, so that states differ in it."""
    sizes = Sizes(actions=ACTIONS, method="random", channels=4, text_width=WIDTH, seed=1)
    weights = service.loaded.weights
    with weights.staging() as folder:
        write_policy(folder, RandomPolicy(sizes))
        weights.publish(folder, "chooser", weights.base, "policy", ("calm", "joy"), {})


def ask(http: httpx.Client, **fields) -> VideosResponse:
    request = {"prompt": "an owl", "image": codec.image_to_base64(FIRST), "seed": 3} | fields
    job = http.post("/v1/jobs", json={"type": "video", "request": request})
    assert job.status_code == 202, job.text
    told = events(http, job.json()["id"])
    final = Job.model_validate(told[-1].data)
    assert final.status == "succeeded", final.problem
    steps = [event.data["step"] for event in told if event.kind == "progress"]
    assert steps == list(range(1, final.steps + 1))
    return VideosResponse.model_validate(final.result)


def played(http: httpx.Client, result: VideosResponse, folder: Path) -> np.ndarray:
    """uint8 [n, M, H, W, 3] of the files."""
    found = []
    for clip in result.data:
        path = folder / f"{clip.sample_id}.webp"
        path.write_bytes(http.get(clip.url).content)
        found.append(clips.read(path))
    return np.stack(found)


def direct(service: Service, weights: WeightSet, rows: list[Row], sampling: Sampling) -> np.ndarray:
    backend = service.loaded.backend
    return backend.generate(weights, backend.chosen(weights, rows, sampling), sampling)


def test_the_file_that_plays_has_the_backends_own_frames(http: httpx.Client, service: Service, tmp_path: Path):
    curve = GuidanceCurve(minimum=1.0, maximum=4.0, a=3.0, b=2.0, peak_normalised=True)
    said = {"negative_prompt": "blurry", "num_inference_steps": 3, "scheduler": "euler", "resampling": 1}
    got = played(http, ask(http, **said, guidance=curve.model_dump(), n=2), tmp_path)
    rows = [Row(seed, None, 3.0, "an owl", "blurry", FIRST, curve) for seed in (3, 4)]
    sampling = Sampling(3, "euler", guided=True, frames=FRAMES, resampling=1)
    np.testing.assert_array_equal(got, direct(service, service.loaded.weights.base, rows, sampling))
    np.testing.assert_array_equal(got[0, 0], FIRST)
    assert (got[0, 1:] != got[1, 1:]).any()


def test_the_settings_fill_what_a_request_leaves_open(http: httpx.Client, service: Service, tmp_path: Path):
    result = ask(http)
    assert (result.frames, result.size, result.data[0].steps, result.data[0].guidance_scale) == (3, "16x16", 2, 3.0)
    row = Row(3, None, 3.0, "an owl", image=FIRST)
    expected = direct(service, service.loaded.weights.base, [row], Sampling(2, "ddim", guided=True, frames=FRAMES))
    np.testing.assert_array_equal(played(http, result, tmp_path), expected)


def test_the_policy_of_the_weights_chooses(http: httpx.Client, service: Service, tmp_path: Path):
    chooser = service.loaded.weights.resolve("chooser")
    sampling = Sampling(2, "ddim", guided=True, frames=FRAMES, policy=True)
    used = set()
    for prompt in ("an owl", "a cat", "x y z", "dogs"):
        result = ask(http, model="chooser", prompt=prompt)
        rows = [Row(3, None, 3.0, prompt, image=FIRST)]
        (row,) = service.loaded.backend.chosen(chooser, rows, sampling)
        (clip,) = result.data
        assert result.policy and (clip.steps, clip.guidance, clip.guidance_scale) == (row.steps, row.guidance, None)
        np.testing.assert_array_equal(played(http, result, tmp_path), direct(service, chooser, rows, sampling))
        used.add((clip.steps, clip.guidance.a))
    assert len(used) > 1
    said = ask(http, model="chooser", num_inference_steps=3)
    assert (said.policy, said.data[0].steps, said.data[0].guidance_scale) == (False, 3, 3.0)


def test_a_clip_that_takes_long_is_cancelled_between_steps(http: httpx.Client, service: Service):
    request = {"prompt": "an owl", "image": codec.image_to_base64(FIRST), "num_frames": 200, "num_inference_steps": 50}
    job = http.post("/v1/jobs", json={"type": "video", "request": request}).json()["id"]
    with http.stream("GET", f"/v1/jobs/{job}/events") as stream:
        next(line for line in stream.iter_lines() if line == "event: progress")
        assert http.delete(f"/v1/jobs/{job}").status_code == 202
    final = Job.model_validate(events(http, job)[-1].data)
    assert (final.status, final.steps) == ("cancelled", 199 * 50)
    assert 1 <= final.step < 1000


def test_a_repeated_real_clip_is_a_near_copy(service: Service):
    nearest, dataset = service.loaded.recorder.nearest, service.loaded.dataset
    clip = np.stack([resized(frame, (SIZE, SIZE)) for frame in dataset.clip(1)])
    started_alike = np.concatenate([clip[:1], np.random.default_rng(5).integers(0, 256, clip[1:].shape, np.uint8)])
    (name, distance), (_, other) = nearest(np.stack([clip, started_alike]))
    assert (name, distance) == (dataset.samples[1].id, 0.0) and other > 0.2


def test_what_cannot_be_had_is_refused(http: httpx.Client):
    request = {"prompt": "x", "image": codec.image_to_base64(FIRST)}
    for fields, param in (
        ({"size": "512x512"}, "size"),
        ({"scheduler": "dpm-solver"}, "scheduler"),
        ({"prompt": " ".join("x" * 76)}, "prompt"),  # and begin and end
        ({"image": "AAAA"}, "image"),
    ):
        answer = http.post("/v1/jobs", json={"type": "video", "request": request | fields})
        problem(answer, 422, answer.json()["error"]["code"], param)
    adapt = {"type": "adapt", "name": "mine", "method": "lora"}
    assert "is not adapted" in problem(http.post("/v1/jobs", json=adapt), 422, "invalid_request", "method")


def test_a_policy_that_learns_is_read_as_well(service: Service, tmp_path: Path):
    sizes = Sizes(actions=ACTIONS, method="reinforce", channels=4, text_width=WIDTH, width=8, attention_heads=2)
    weights = service.loaded.weights
    with weights.staging() as folder:
        write_policy(folder, SamplingPolicy(sizes))
        learnt = weights.publish(folder, "learnt", weights.base, "policy", (), {})
    rows = [Row(3, None, 3.0, "an owl", image=FIRST)]
    (row,) = service.loaded.backend.chosen(learnt, rows, Sampling(2, "ddim", frames=FRAMES, policy=True))
    assert row.steps in ACTIONS.steps and (row.guidance.minimum, row.guidance.maximum) == (1.0, 4.0)
