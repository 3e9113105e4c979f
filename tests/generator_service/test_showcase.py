"""Which samples of a unit are shown, and how small; against a real broker."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from generator_service.showcase import EACH, FRAMES, SOURCES, THUMBNAIL, moving_thumbnail, show, thumbnail
from protocol import clips, codec
from protocol.broker import connect
from protocol.bus import Bus, QueueConfig
from protocol.entries import SampleBatch
from tests.trainer.test_pool import make_batch


@pytest.fixture
def bus(queue_url: str) -> Iterator[Bus]:
    bus = Bus(queue_url, QueueConfig(url=queue_url))
    yield bus
    bus.close()


def unit(number: int, sources: int, each: int) -> tuple[SampleBatch, np.ndarray]:
    """A unit's batch of `each` samples of each source, every image filled with its row number."""
    batch, _ = make_batch(0, number, 4, [f"s{number}-{source}" for source in range(sources) for _ in range(each)])
    samples = [
        sample.model_copy(update={"index": row % each, "id": f"{number}-{row}"})
        for row, sample in enumerate(batch.samples)
    ]
    images = np.arange(len(samples), dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), dtype=np.uint8)
    return batch.model_copy(update={"samples": samples}), images


def test_the_first_samples_of_the_hardest_sources_are_shown(bus: Bus):
    for number in range(4):
        show(bus.board, *unit(number, sources=3, each=EACH + 2))
    found = bus.board.samples(unit(0, 1, 1)[0].run, 100)
    sources = [f"s{number}-{source}" for number in range(4) for source in range(3)][:SOURCES]
    assert {shown.sample.source_id for shown in found} == set(sources)
    assert sorted(shown.sample.index for shown in found) == sorted(list(range(EACH)) * SOURCES)
    for shown in found:
        number, row = map(int, shown.sample.id.split("-"))
        picture = codec.image_from_bytes(base64.b64decode(shown.thumbnail))
        assert (picture == row).all(), f"row {row} of unit {number}"


@pytest.mark.parametrize(("size", "small"), [((8, 8), (8, 8)), ((512, 256), (THUMBNAIL, THUMBNAIL // 2))])
def test_thumbnails_are_small(size: tuple[int, int], small: tuple[int, int]):
    assert codec.image_from_bytes(thumbnail(np.zeros((*size, 3), dtype=np.uint8))).shape[:2] == small


def test_thumbnails_of_clips_move_and_last_as_long(tmp_path: Path):
    levels = np.arange(20, 212, 12, dtype=np.uint8)  # of 16 frames
    clip = levels[:, None, None, None] * np.ones((1, 200, 100, 3), dtype=np.uint8)
    for frames, shown in ((16, [1, 3, 5, 7, 9, 11, 13, 15]), (3, [0, 1, 2])):
        (tmp_path / "small.webp").write_bytes(data := moving_thumbnail(clip[:frames], 4.0))
        small = clips.read(tmp_path / "small.webp")
        assert small.shape[:3] == (min(FRAMES, frames), THUMBNAIL, THUMBNAIL // 2)
        np.testing.assert_allclose(small.mean(axis=(1, 2, 3)), levels[shown], atol=4)
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
            assert picture.info["duration"] * len(shown) == pytest.approx(1000 * frames / 4.0, abs=1)


def test_clips_are_shown_as_animated_pictures(bus: Bus, tmp_path: Path):
    batch, images = unit(0, sources=1, each=2)
    moving = np.stack([images, images + 100], axis=1)
    show(bus.board, batch, moving)
    for shown in bus.board.samples(batch.run, 10):
        (tmp_path / "shown.webp").write_bytes(base64.b64decode(shown.thumbnail))
        means = clips.read(tmp_path / "shown.webp").mean(axis=(1, 2, 3))
        np.testing.assert_allclose(means, shown.sample.index + np.array([0, 100]), atol=4)
        assert shown.media_type == "image/webp"


def test_a_broker_without_room_or_away_is_passed_over(bus: Bus, queue_url: str):
    batch, images = unit(0, 1, 1)
    with connect(queue_url) as broker:
        broker.config_set("maxmemory", 1)
        show(bus.board, batch, images)
        broker.config_set("maxmemory", 0)
    assert bus.board.samples(batch.run, 10) == []
    away = Bus("redis://127.0.0.1:9/0", QueueConfig())
    show(away.board, batch, images)
    away.close()
