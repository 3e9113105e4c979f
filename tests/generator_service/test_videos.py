"""Clips over HTTP: jobs, events, cancelling, playback, errors, limits; real server, scripted backend."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from agent import cli
from generator_service.service import Service
from protocol import clips as clip_files
from protocol import codec
from protocol.client import GeneratorClient
from protocol.client_async import AsyncGeneratorClient
from protocol.entries import Sample
from protocol.errors import ConfigError, InvalidRequest, UnknownSample
from protocol.messages import Job
from protocol.video import GuidanceCurve, VideoGenerationRequest, VideoJob, VideosResponse
from tests.generator_service.scripted_clips import CHOICES, clips, moving, publish_policy
from tests.generator_service.test_app import events, problem
from tests.generator_service.tiny_service import make_service, served, started

FIRST = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
PICTURE = codec.image_to_base64(FIRST)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, clip_settings: dict) -> Iterator[Service]:
    """One service for all tests here, with a set of weights that has a policy."""
    with started(make_service(tmp_path_factory.mktemp("service"), **clip_settings)) as service:
        publish_policy(service.loaded.weights)
        yield service
        clips(service).release()


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    with served(service) as url:
        yield url


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url) as client:
        yield client


def body(**fields) -> dict:
    return {"type": "video", "request": {"prompt": "she smiles", "image": PICTURE, "seed": 3} | fields}


def made(http: httpx.Client, **fields) -> tuple[VideosResponse, Job]:
    """The clips of a job, and how it ended."""
    job = http.post("/v1/jobs", json=body(**fields))
    assert job.status_code == 202, job.text
    events(http, job.json()["id"])
    final = Job.model_validate_json(http.get(job.headers["location"]).content)
    assert final.status == "succeeded", final.problem
    return VideosResponse.model_validate(final.result), final


def read(data: bytes, suffix: str, folder: Path) -> np.ndarray:
    (folder / f"clip.{suffix}").write_bytes(data)
    return clip_files.read(folder / f"clip.{suffix}")


# ---------------------------------------------------------------- from a job to a file that plays


def test_a_job_from_submission_to_a_file_that_gives_back_the_frames(http: httpx.Client, tmp_path: Path):
    submitted = http.post("/v1/jobs", json=body(n=2, user="me"))
    job = Job.model_validate_json(submitted.content)
    assert (submitted.status_code, job.type) == (202, "video")
    found = events(http, job.id)
    assert [event.kind for event in found] == ["status", "status", *["progress"] * 10, "end"]
    assert [event.data["step"] for event in found if event.kind == "progress"] == list(range(1, 11))
    result = VideosResponse.model_validate(found[-1].data["result"])
    assert (result.output_format, result.size, result.frames, result.fps, result.policy) == ("webp", "8x8", 6, 8, False)
    for number, clip in enumerate(result.data):
        assert (clip.seed, clip.steps, clip.guidance_scale, clip.guidance) == (3 + number, 10, 9.0, None)
        answer = http.get(clip.url)
        assert answer.headers["content-type"] == "image/webp"
        np.testing.assert_array_equal(read(answer.content, "webp", tmp_path), moving(FIRST, 3 + number, 6))
        sample = Sample.model_validate_json(http.get(f"/v1/samples/{clip.sample_id}").content)
        assert (sample.frames, sample.fps, sample.steps, sample.guidance_scale, sample.policy) == (6, 8, 10, 9, False)
        assert (sample.user, sample.class_name, sample.weights) == ("me", None, result.weights)


@pytest.mark.parametrize(
    ("clip_format", "media_type", "magic"),
    [("webp", "image/webp", b"RIFF"), ("gif", "image/gif", b"GIF8"), ("mp4", "video/mp4", b"\0\0\0")],
)
def test_clips_come_in_the_format_asked_for_by_value_or_by_url(
    http: httpx.Client, tmp_path: Path, clip_format: str, media_type: str, magic: bytes
):
    inline, _ = made(http, output_format=clip_format, response_format="b64_json", fps=4.0)
    data = base64.b64decode(inline.data[0].b64_json)
    assert data.startswith(magic) and inline.data[0].url is None and inline.fps == 4.0
    answer = http.get(f"/v1/samples/{inline.data[0].sample_id}/video")
    assert (answer.content, answer.headers["content-type"]) == (data, media_type)
    frames = read(data, clip_format, tmp_path)
    assert frames.shape == (6, 8, 8, 3)
    assert [abs(int(frames[m].mean()) - (3 + m)) <= 8 for m in range(1, 6)] == [True] * 5  # lossy, but for webp


def test_a_part_of_a_file_for_players_that_seek(http: httpx.Client):
    result, _ = made(http, output_format="mp4")
    path = f"/v1/samples/{result.data[0].sample_id}/video"
    whole = http.get(path)
    assert (whole.status_code, whole.headers["accept-ranges"]) == (200, "bytes")
    size = len(whole.content)
    for wanted, expected in (
        ("bytes=0-99", slice(0, 100)),
        ("bytes=100-", slice(100, None)),
        ("bytes=-10", slice(-10, None)),
        (f"bytes=5-{size + 5}", slice(5, None)),
        (f"bytes=-{size + 5}", slice(0, None)),
    ):
        part = http.get(path, headers={"Range": wanted})
        assert (part.status_code, part.content) == (206, whole.content[expected]), wanted
        start, end = expected.indices(size)[0], expected.indices(size)[1] - 1
        assert part.headers["content-range"] == f"bytes {start}-{end}/{size}", wanted
    for ignored in ("bytes=-", "bytes=0-1,4-5", f"bytes={size}-", "bytes=9-3", "bytes=-0", "lines=1-2", "x"):
        assert http.get(path, headers={"Range": ignored}).content == whole.content, ignored


def test_images_and_clips_are_not_taken_for_each_other(http: httpx.Client):
    result, _ = made(http)
    problem(http.get(f"/v1/samples/{result.data[0].sample_id}/image"), 404, "unknown_sample")
    problem(http.get("/v1/samples/nope/video"), 404, "unknown_sample")
    problem(http.get("/v1/samples/..%2F..%2Fsamples.jsonl/video"), 404, "not_found")


# ---------------------------------------------------------------- what is used, and who chooses it


def test_everything_a_request_says_reaches_the_backend(http: httpx.Client, service: Service):
    curve = {"minimum": 2.0, "maximum": 8.0, "a": 3.0, "b": 2.0, "peak_normalised": True}
    said = {"negative_prompt": "blurry", "num_inference_steps": 4, "resampling": 1, "scheduler": "euler"}
    result, _ = made(http, **said, guidance=curve, num_frames=3)
    (row,), sampling = clips(service).asked[-1]
    assert (row.prompt, row.negative_prompt, row.guidance) == ("she smiles", "blurry", GuidanceCurve(**curve))
    np.testing.assert_array_equal(row.image, FIRST)
    assert (sampling.steps, sampling.scheduler, sampling.frames, sampling.resampling) == (4, "euler", 3, 1)
    assert (sampling.guided, sampling.policy) == (True, False)
    (clip,) = result.data
    assert (clip.steps, clip.guidance_scale, clip.guidance) == (4, None, GuidanceCurve(**curve))


def test_a_policy_chooses_for_each_clip_and_the_reply_says_what(http: httpx.Client, service: Service):
    result, _ = made(http, model="chooser", n=2, seed=8)
    assert clips(service).asked[-1][1].policy and result.policy and result.weights.name == "chooser"
    assert [(clip.steps, clip.guidance, clip.guidance_scale) for clip in result.data] == [
        (*choice, None) for choice in CHOICES
    ]
    sample = Sample.model_validate_json(http.get(f"/v1/samples/{result.data[1].sample_id}").content)
    assert (sample.policy, sample.steps, sample.guidance) == (True, *CHOICES[1])
    said, _ = made(http, model="chooser", num_inference_steps=6)
    assert (said.policy, said.data[0].steps, said.data[0].guidance_scale) == (False, 6, 9.0)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"size": "512x512"}, "unsupported_field", "size"),
        ({"prompt": "one two three four five six seven"}, "invalid_request", "prompt"),
        ({"prompt": ""}, "invalid_request", None),
        ({"image": "AAAA"}, "invalid_image", "image"),
        ({"image": None}, "invalid_request", None),
        ({"scheduler": "unipc"}, "unsupported_field", "scheduler"),
        ({"num_frames": 1}, "invalid_request", None),
        ({"n": 17}, "invalid_request", None),
        ({"guidance_scale": 3.0, "guidance": {}}, "invalid_request", None),
        ({"guidance": {"minimum": 8.0, "maximum": 7.0}}, "invalid_request", None),
        ({"model": "nope"}, "unknown_weights", "model"),
        ({"num_frames": 257}, "invalid_request", "num_frames"),
        ({"num_frames": 20, "n": 13}, "invalid_request", "num_frames"),
        ({"class_label": 1}, "invalid_request", None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_field_is_named_and_leaves_no_job(http: httpx.Client, fields: dict, code: str, param: str | None):
    before = len(http.get("/v1/jobs").json()["data"])
    answer = http.post("/v1/jobs", json=body(**fields))
    problem(answer, 404 if "weights" in code else 422, code, param)
    assert len(http.get("/v1/jobs").json()["data"]) == before


def test_images_are_refused_where_clips_are_made_and_clips_where_images_are(http: httpx.Client, dit_service: Service):
    for path, sent in (
        ("/v1/images/generations", {"prompt": "x"}),
        ("/v1/jobs", {"type": "generate", "request": {"prompt": "x"}}),
    ):
        told = problem(http.post(path, json=sent), 422, "invalid_request", "model")
        assert 'job of type "video"' in told
    with served(dit_service) as url, httpx.Client(base_url=url) as images:
        told = problem(images.post("/v1/jobs", json=body()), 422, "invalid_request", "model")
        assert "make images only" in told


def test_the_sampler_of_the_settings_is_checked_where_it_counts(tmp_path: Path, clip_settings: dict):
    wrong = clip_settings | {"videos": {"scheduler": "unipc"}}
    with (
        pytest.raises(ConfigError, match=r"generator\.videos\.scheduler = 'unipc'"),
        started(make_service(tmp_path, **wrong)),
    ):
        pass
    with started(make_service(tmp_path, **clip_settings, images={"scheduler": "unipc"})) as service:
        service.engine.check_ready()


def test_a_backend_that_raises_fails_the_job(http: httpx.Client):
    job = http.post("/v1/jobs", json=body(prompt="boom")).json()["id"]
    final = events(http, job)[-1].data
    assert (final["status"], final["problem"]["error"]["code"]) == ("failed", "generation_failed")


# ---------------------------------------------------------------- cancelling, keys, owners, limits


def test_a_clip_is_cancelled_between_steps(http: httpx.Client, service: Service):
    backend = clips(service)
    backend.hold()
    job = http.post("/v1/jobs", json=body(seed=111)).json()["id"]
    backend.inside.wait()
    backend.allow(2)
    stream = _progress(http, job)
    assert [next(stream), next(stream)] == [1, 2]
    assert http.delete(f"/v1/jobs/{job}").status_code == 202
    backend.release()
    final = events(http, job)[-1].data
    assert (final["status"], final["step"], final["result"]) == ("cancelled", 2, None)
    begun = backend.events.index(("batch", "base@1", [111]))
    assert backend.events[begun + 1 :] == [("step", 1), ("step", 2), ("step", 3)]  # of ten


def _progress(http: httpx.Client, job: str) -> Iterator[int]:
    with http.stream("GET", f"/v1/jobs/{job}/events") as response:
        for line in response.iter_lines():
            if line.startswith("data: ") and '"progress"' in line:
                yield json.loads(line.removeprefix("data: "))["data"]["step"]


def test_the_same_key_and_body_make_one_clip(http: httpx.Client):
    headers = {"Idempotency-Key": "one clip"}
    first, second = (http.post("/v1/jobs", json=body(), headers=headers) for _ in range(2))
    assert first.content == second.content
    problem(http.post("/v1/jobs", json=body(seed=4), headers=headers), 409, "idempotency_conflict")


def test_frames_that_wait_are_counted_for_each_owner(tmp_path: Path, clip_settings: dict):
    limits = {"waiting_images": 12}
    settings = clip_settings | {"keys": {"alice": "rabbit", "bob": "hatter"}, "max_batch": 1, "limits": limits}
    with started(make_service(tmp_path, **settings)) as service, served(service) as url:
        alice, bob = (
            httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}) for key in ("rabbit", "hatter")
        )
        with alice, bob:
            clips(service).hold()
            assert alice.post("/v1/jobs", json=body()).status_code == 202
            clips(service).inside.wait()  # and none waits
            told = problem(alice.post("/v1/jobs", json=body(n=3)), 422, "invalid_request", "num_frames")
            assert "3 x 6 frames are 18 images, and at most 12 of yours" in told
            waiting = alice.post("/v1/jobs", json=body(n=2))
            assert waiting.status_code == 202
            assert "12 may" in problem(alice.post("/v1/jobs", json=body(num_frames=2)), 429, "queue_full")
            assert bob.post("/v1/jobs", json=body(n=2)).status_code == 202
            problem(bob.get(waiting.headers["location"]), 403, "forbidden")
            clips(service).release()


# ---------------------------------------------------------------- clients


def test_the_client_submits_follows_and_fetches(url: str, tmp_path: Path):
    request = VideoGenerationRequest(prompt="she smiles", image=PICTURE, seed=3)
    with GeneratorClient([url, "http://127.0.0.1:9"]) as client:
        job = client.submit(VideoJob(request=request))
        assert [event.kind for event in client.events(job.id)][-1] == "end"
        result = VideosResponse.model_validate(client.job(job.id).result)
        data = client.video(result.data[0].sample_id, job.id)
        with pytest.raises(UnknownSample):
            client.video("nope")
        with pytest.raises(InvalidRequest, match="8x8 clips only"):
            client.submit(VideoJob(request=request.model_copy(update={"size": "512x512"})))
    np.testing.assert_array_equal(read(data, "webp", tmp_path), moving(FIRST, 3, 6))

    async def fetched() -> bytes:
        async with AsyncGeneratorClient(url) as client:
            return await client.video(result.data[0].sample_id)

    assert asyncio.run(fetched()) == data


def test_the_command_writes_the_clips(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "first.png").write_bytes(codec.image_to_bytes(FIRST))
    out = tmp_path / "made"
    command = ["video", str(tmp_path / "first.png"), "she smiles", "--url", url, "-n", "2", "--seed", "3"]
    assert cli.main([*command, "--frames", "4", "--steps", "2", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[1:3] for line in lines] == [["seed 3", "2 steps"], ["seed 4", "2 steps"]]
    for number, line in enumerate(lines):
        np.testing.assert_array_equal(clip_files.read(Path(line.split("  ")[0])), moving(FIRST, 3 + number, 4))
    assert cli.main(["video", str(tmp_path / "no.png"), "x", "--url", url]) == 2
