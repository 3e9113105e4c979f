"""The dataset at a backend's size: the same images whether they are kept in memory or left in their files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from generator_service import real_images
from generator_service.metrics.nearest import NearestReal
from generator_service.real_images import Pictures, RealImages, resized
from protocol.dataset import Dataset, DatasetConfig
from tests.generator_service.test_clip_units import write_clips
from tests.generator_service.tiny_service import write_dataset


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return Dataset.open(DatasetConfig(root=write_dataset(tmp_path / "data")))


def test_what_does_not_fit_into_memory_stays_in_its_files(dataset: Dataset, monkeypatch: pytest.MonkeyPatch):
    kept = RealImages.read(dataset, (12, 10))
    monkeypatch.setattr(real_images, "KEEP_BYTES", 0)
    left = RealImages.read(dataset, (12, 10))
    assert isinstance(left.images, Pictures) and left.images.shape == kept.images.shape and len(left.images) > 2
    expected = np.stack([resized(dataset.image(at), (12, 10)) for at in range(len(dataset))])
    np.testing.assert_array_equal(kept.images, expected)
    for rows in (slice(None), slice(1, 3), np.array([2, 0]), np.array([1])):
        np.testing.assert_array_equal(left.images[rows], expected[rows])


@pytest.mark.parametrize("keep", [0, 2**30])
def test_another_picture_or_label_has_another_digest(dataset: Dataset, monkeypatch: pytest.MonkeyPatch, keep: int):
    monkeypatch.setattr(real_images, "KEEP_BYTES", keep)
    real = RealImages.read(dataset, (8, 8))
    assert real.digest() == RealImages.read(dataset, (8, 8)).digest()
    relabelled = RealImages(real.images, 1 - real.labels, real.ids, real.captions)
    before, path = real.digest(), dataset.samples[0].path
    path.write_bytes(dataset.samples[-1].path.read_bytes())
    assert len({before, relabelled.digest(), RealImages.read(dataset, (8, 8)).digest()}) == 3


def test_large_copies_are_found_among_small_pictures():
    rng = np.random.default_rng(0)
    real = rng.integers(0, 256, (3, 200, 100, 3), dtype=np.uint8)
    search = NearestReal(real, ["a", "b", "c"])
    assert search._real.shape == (3, 64 * 64 * 3)
    assert search(real[[2, 0]]) == [("c", 0.0), ("a", 0.0)]
    (_, distance) = search(255 - real[:1])[0]
    assert distance > 0.02


# ---------------------------------------------------------------- clips


@pytest.fixture
def clips(tmp_path: Path) -> Dataset:
    return Dataset.open(DatasetConfig(root=write_clips(tmp_path / "clips"), layout="clips"))


def test_clips_are_a_few_frames_evenly_spread_in_memory_or_not(clips: Dataset, monkeypatch: pytest.MonkeyPatch):
    kept = RealImages.read(clips, (12, 10), 3)
    monkeypatch.setattr(real_images, "KEEP_BYTES", 0)
    left = RealImages.read(clips, (12, 10), 3)
    assert isinstance(left.images, Pictures) and left.images.shape == kept.images.shape == (4, 3, 12, 10, 3)
    frames = (1, 3, 5)  # of six
    expected = np.stack(
        [[resized(clips.image(at, frame), (12, 10)) for frame in frames] for at in range(len(clips.samples))]
    )
    np.testing.assert_array_equal(kept.images, expected)
    for rows in (slice(None), slice(1, 3), np.array([2, 0])):
        np.testing.assert_array_equal(left.images[rows], expected[rows])


def test_a_backend_of_images_gets_first_frames_and_one_of_clips_images_that_stand_still(
    clips: Dataset, dataset: Dataset
):
    first = RealImages.read(clips, (8, 8)).images
    np.testing.assert_array_equal(first, np.stack([clips.image(at, 0) for at in range(4)]))
    still = RealImages.read(dataset, (8, 8), 2).images
    for frame in (0, 1):
        np.testing.assert_array_equal(still[:, frame], RealImages.read(dataset, (8, 8)).images)


@pytest.mark.parametrize("keep", [0, 2**30])
def test_another_frame_has_another_digest(clips: Dataset, monkeypatch: pytest.MonkeyPatch, keep: int):
    monkeypatch.setattr(real_images, "KEEP_BYTES", keep)
    before = RealImages.read(clips, (8, 8), 4).digest()
    assert before == RealImages.read(clips, (8, 8), 4).digest()
    folder = clips.samples[0].path
    (folder / "3.png").write_bytes((folder / "2.png").read_bytes())
    assert before != RealImages.read(clips, (8, 8), 4).digest()
