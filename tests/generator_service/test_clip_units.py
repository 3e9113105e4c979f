"""Work units of clips, from the queue to the batch: on a real broker, with a mounted dataset of clips."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from generator_service.service import Service
from protocol import codec
from protocol.bus import Bus, QueueConfig
from protocol.dataset import Dataset, DatasetConfig
from protocol.entries import BlobRef
from protocol.video import GuidanceCurve
from tests.generator_service.scripted_clips import CHOICES, clips, moving, publish_policy
from tests.generator_service.test_queue_worker import RUN, batches, images, publish, work_row, work_unit
from tests.generator_service.tiny_service import make_service, served, started

CLIP = {"frames": 5, "fps": 12.0, "resampling": 1}
CURVE = GuidanceCurve(minimum=1.0, maximum=4.0, a=3.0, b=2.0)
LENGTH = 6  # frames of a real clip


def write_clips(root: Path) -> Path:
    """Two classes of two clips, each a folder of frames of noise."""
    rng = np.random.default_rng(0)
    for name in ("calm", "joy"):
        for number in range(2):
            folder = root / name / f"clip{number}"
            folder.mkdir(parents=True)
            for frame in range(LENGTH):
                noise = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(noise).save(folder / f"{frame}.png")
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture
def dataset(root: Path) -> Dataset:
    return Dataset.open(DatasetConfig(root=root, layout="clips"))


@pytest.fixture
def bus(queue_url: str) -> Iterator[Bus]:
    bus = Bus(queue_url, QueueConfig(url=queue_url, lease_idle_s=1.0))
    yield bus
    bus.close()


@pytest.fixture
def service(tmp_path: Path, clip_settings: dict, root: Path, queue_url: str) -> Iterator[Service]:
    settings = clip_settings | {"dataset": {"root": root, "layout": "clips"}}
    with started(make_service(tmp_path, queue_url, **settings)) as service:
        yield service


def test_a_unit_of_clips_from_the_queue_to_its_batch(service: Service, bus: Bus, dataset: Dataset):
    first, other = dataset.samples[0].id, dataset.samples[3].id
    rows = [
        work_row(1, init_id=first, init_frame=2, action_units=["AU06", "AU12"], prompt_by="template"),
        work_row(2, init_id=first, init_frame=4, guidance=CURVE, guidance_scale=0.0, negative_prompt="blurry"),
        work_row(3, init_id=other),
    ]
    publish(bus, work_unit(0, service.loaded.weights.base.ref, *rows, **CLIP))
    (batch,) = batches(bus, 1)
    begun = [dataset.image(0, 2), dataset.image(0, 4), dataset.image(3, 0)]
    expected = np.stack([moving(image, seed, 5) for seed, image in zip((1, 2, 3), begun, strict=True)])
    assert images(batch).dtype == np.uint8
    np.testing.assert_array_equal(images(batch), expected)
    asked, sampling = clips(service).asked[-1]
    assert [(row.guidance_scale, row.guidance, row.negative_prompt) for row in asked] == [
        (2.0, None, None),
        (0.0, CURVE, "blurry"),
        (2.0, None, None),
    ]
    assert (sampling.frames, sampling.resampling, sampling.steps, sampling.guided) == (5, 1, 4, True)
    for sample, row in zip(batch.samples, rows, strict=True):
        assert (sample.frames, sample.fps, sample.resampling, sample.policy) == (5, 12.0, 1, False)
        assert (sample.init_id, sample.init_frame) == (row.init_id, row.init_frame)
        assert (sample.action_units, sample.prompt_by) == (row.action_units, row.prompt_by)
        assert (sample.steps, sample.guidance, sample.guidance_scale) == (4, row.guidance, row.guidance_scale)
        assert sample.nearest_real in {entry.id for entry in dataset.samples} and not sample.near_copy
        assert service.samples.get(sample.id) == sample


def test_a_policy_chooses_for_each_row_and_provenance_says_what(service: Service, bus: Bus, dataset: Dataset):
    chooser = publish_policy(service.loaded.weights)
    rows = [work_row(number, init_id=dataset.samples[number].id, guidance_scale=0.0) for number in range(3)]
    publish(bus, work_unit(0, chooser.ref, *rows, policy=True, **CLIP))
    (batch,) = batches(bus, 1)
    assert [(s.policy, s.steps, s.guidance) for s in batch.samples] == [(True, *CHOICES[n % 2]) for n in range(3)]
    assert clips(service).asked[-1][1].guided


def test_guidance_that_no_row_has_is_off(service: Service, bus: Bus, dataset: Dataset):
    off = GuidanceCurve(minimum=0.0, maximum=1.0)
    rows = [work_row(1, init_id=dataset.samples[0].id, guidance=off), work_row(2, init_id=dataset.samples[1].id)]
    ref = service.loaded.weights.base.ref
    for number, guided in ((0, False), (1, True)):  # the second row has its scale alone
        publish(bus, work_unit(0, ref, *rows[: number + 1], id=f"{RUN}.{number}.0.x", **CLIP), number=number)
        batches(bus, 1)
        assert clips(service).asked[-1][1].guided is guided


def test_first_frames_that_travel_with_a_unit(service: Service, bus: Bus):
    sent = np.random.default_rng(1).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    blob: BlobRef = bus.put_blob(codec.encode({"images": sent}), blob_id="first")
    unit = work_unit(0, service.loaded.weights.base.ref, work_row(1), work_row(2), init_blob=blob, **CLIP)
    publish(bus, unit)
    (batch,) = batches(bus, 1)
    np.testing.assert_array_equal(images(batch)[:, 0], sent)


@pytest.mark.parametrize(
    ("row", "told"),
    [({}, "first frame"), ({"init_frame": LENGTH}, "no frame 6"), ({"init_id": "nope"}, "mount the same dataset")],
    ids=str,
)
def test_a_clip_without_its_first_frame_is_answered_as_a_dead_letter(
    service: Service, bus: Bus, dataset: Dataset, row: dict, told: str
):
    init = {"init_id": dataset.samples[0].id} if row else {}
    publish(bus, work_unit(0, service.loaded.weights.base.ref, work_row(1, **(init | row)), **CLIP))
    (failed,) = batches(bus, 1)
    assert failed.blob is None and told in failed.error["detail"]
    (info,) = bus.dead.newest().data
    assert info.letter.problem == failed.error


def test_a_unit_that_does_not_fit_is_made_in_halves(service: Service, bus: Bus, dataset: Dataset):
    clips(service).fits = 2
    rows = [work_row(number, init_id=dataset.samples[number % 4].id) for number in range(5)]
    publish(bus, work_unit(0, service.loaded.weights.base.ref, *rows, **CLIP))
    (batch,) = batches(bus, 1)
    expected = np.stack([moving(dataset.image(number % 4), number, 5) for number in range(5)])
    np.testing.assert_array_equal(images(batch), expected)
    assert [len(asked) for asked, _ in clips(service).asked[1:]] == [5, 3, 2, 1, 2]


def test_a_copied_clip_is_flagged_and_one_that_goes_its_own_way_is_not(
    service: Service, bus: Bus, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
):
    copied, own = dataset.samples[1].id, dataset.samples[2].id
    backend = clips(service)
    made = np.stack([dataset.clip(1), moving(dataset.image(2), 7, LENGTH)])
    monkeypatch.setattr(backend, "generate", lambda *_: made)
    unit = work_unit(0, service.loaded.weights.base.ref, work_row(1, init_id=copied), work_row(2, init_id=own))
    publish(bus, unit.model_copy(update=CLIP | {"frames": LENGTH}))
    (batch,) = batches(bus, 1)
    assert [sample.near_copy for sample in batch.samples] == [True, False]
    assert (batch.samples[0].nearest_real, batch.samples[0].nearest_distance) == (copied, 0.0)


def test_operators_see_clips_move_and_the_frame_that_they_begin_with(service: Service, bus: Bus, dataset: Dataset):
    init = dataset.samples[1].id
    publish(bus, work_unit(0, service.loaded.weights.base.ref, work_row(0, init_id=init, init_frame=3), **CLIP))
    batches(bus, 1)
    with served(service) as url, httpx.Client(base_url=url) as http:
        (shown,) = http.get(f"/v1/runs/{RUN}/samples").json()["data"]
        assert (shown["media_type"], shown["sample"]["init_frame"]) == ("image/webp", 3)
        for query, frame in (("", 0), ("?frame=3", 3)):
            picture = http.get(f"/v1/sources/{init}/image{query}")
            np.testing.assert_array_equal(codec.image_from_bytes(picture.content), dataset.image(1, frame))
        refused = http.get(f"/v1/sources/{init}/image?frame={LENGTH}")
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "invalid_clip")
