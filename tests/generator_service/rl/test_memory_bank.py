"""The memory bank of a dataset's images."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from generator_service.published_models import PublishedModels
from generator_service.real_images import RealImages
from generator_service.rl import memory_bank
from generator_service.rl.features import Extractor, open_extractor
from generator_service.rl.rewards import Bank
from protocol.dataset import Dataset, DatasetConfig
from protocol.errors import UnknownClass
from tests.generator_service.tiny_service import write_dataset


@pytest.fixture(scope="module")
def extractor(tmp_path_factory: pytest.TempPathFactory) -> Extractor:
    store = PublishedModels(tmp_path_factory.mktemp("published"))
    return open_extractor("timm:test_resnet", pretrained=False, size=32, published=store, device="cpu")


def real_images(labels: list[int]) -> RealImages:
    images = np.random.default_rng(0).integers(0, 256, (len(labels), 16, 16, 3), dtype=np.uint8)
    return RealImages(images, np.array(labels, dtype=np.int64), [str(label) for label in labels], [None] * len(labels))


def drained(building: Generator[int, None, Bank]) -> tuple[list[int], Any]:
    done = []
    while True:
        try:
            done.append(next(building))
        except StopIteration as end:
            return done, end.value


def test_every_image_is_in_it_in_its_place(extractor: Extractor):
    real = real_images([2, 0, 1, 1, 0, 2, 1])
    done, bank = drained(memory_bank.build(extractor, real, 3))
    assert done == [3, 6, 7]
    assert bank.labels.tolist() == [2, 0, 1, 1, 0, 2, 1]
    for row, image in enumerate(real.images):
        torch.testing.assert_close(bank.features[row], extractor(image[None])[0], atol=1e-6, rtol=0)


def test_a_class_may_have_one_image(extractor: Extractor):
    _, bank = drained(memory_bank.build(extractor, real_images([0, 1, 2]), 2))
    assert bank.of(1).shape == (1, extractor.dimensions)


@pytest.mark.parametrize(
    ("labels", "classes", "said"),
    [([0, 2], None, "of 1:"), ([0, 1], ("a", "b", "c", "d"), "of 'c', 'd':"), ([], None, "of any class:")],
)
def test_a_class_without_an_image_is_named(extractor: Extractor, labels: list, classes: tuple | None, said: str):
    with pytest.raises(UnknownClass, match=said):
        drained(memory_bank.build(extractor, real_images(labels), 2, classes))


def test_images_that_stay_in_their_files(extractor: Extractor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    dataset = Dataset.open(DatasetConfig(root=write_dataset(tmp_path / "data")))
    kept = RealImages.read(dataset, (16, 16))
    monkeypatch.setattr("generator_service.real_images.KEEP_BYTES", 0)
    decoded = RealImages.read(dataset, (16, 16))
    assert isinstance(kept.images, np.ndarray) and not isinstance(decoded.images, np.ndarray)
    _, one = drained(memory_bank.build(extractor, kept, 5, dataset.classes))
    _, other = drained(memory_bank.build(extractor, decoded, 5, dataset.classes))
    assert torch.equal(one.features, other.features) and torch.equal(one.labels, other.labels)
