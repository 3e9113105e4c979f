"""Which samples of a unit are shown, and how small; against a real broker."""

from __future__ import annotations

import base64
from collections.abc import Iterator

import numpy as np
import pytest

from generator_service.showcase import EACH, SOURCES, THUMBNAIL, show, thumbnail
from protocol import codec
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
