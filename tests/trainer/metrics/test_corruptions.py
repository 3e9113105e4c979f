from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from protocol.dataset import Dataset, DatasetConfig
from tests.trainer.run_folder import write_dataset
from trainer.data.images import RealImages
from trainer.metrics.corruptions import STRENGTHS, Corrupted, gaussian_blur, scale_for, speckle_noise


def pictures(count: int = 3, size: int = 24) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8))


@pytest.mark.parametrize("sigma", [0.4, 1.0, 2.0, 6.0])
def test_blur_is_scipys_with_repeated_edges(sigma: float):
    images = pictures()
    wanted = gaussian_filter(images.numpy().astype(float), (0, sigma, sigma, 0), mode="nearest", truncate=4.0)
    off = np.abs(gaussian_blur(images, sigma).numpy() - wanted)
    assert off.max() <= 0.5 + 1e-3  # rounded to the nearest level


def test_blur_of_one_bright_pixel_by_hand():
    """At sigma 1 the kernel's centre is 1 / sum over -4..4 of exp(-k^2 / 2) = 0.39894 a side, its neighbour 0.24197."""
    images = torch.zeros(1, 9, 9, 3, dtype=torch.uint8)
    images[0, 4, 4] = 255
    blurred = gaussian_blur(images, 1.0)[0, :, :, 0]
    assert blurred[4, 4] == round(255 * 0.39894**2)
    assert blurred[4, 5] == blurred[3, 4] == round(255 * 0.39894 * 0.24197)
    assert int(blurred.sum()) == pytest.approx(255, abs=12)  # every pixel rounded


def test_speckle_noise_is_a_part_of_the_pixel():
    images = pictures(2)
    noise = torch.stack([torch.randn(24, 24, 3, generator=torch.Generator().manual_seed(s)) for s in (5, 9)])
    x = images.numpy().astype(float)
    wanted = np.clip(np.rint(x * (1 + 0.35 * noise.numpy().astype(float))), 0, 255)
    assert np.abs(speckle_noise(images, 0.35, [5, 9]).numpy() - wanted).max() <= 1  # float32 may round the other way


def test_speckle_noise_has_the_deviation_it_should():
    grey = torch.full((1, 200, 200, 3), 100, dtype=torch.uint8)
    noisy = speckle_noise(grey, 0.2, [0]).double()
    assert noisy.mean().item() == pytest.approx(100, abs=0.3)  # standard error 20 / sqrt(120000) = 0.06
    assert noisy.std().item() == pytest.approx(20, rel=0.02)
    assert not speckle_noise(torch.zeros_like(grey), 0.6, [0]).any()  # black stays black


def test_strengths_grow_with_severity_and_suit_the_size():
    for kinds in STRENGTHS.values():
        for strengths in kinds.values():
            assert len(strengths) == 5
            assert list(strengths) == sorted(strengths)
    assert (scale_for(32), scale_for(224)) == ("cifar-c", "imagenet-c")


def test_rows_do_not_depend_on_how_they_are_read(tmp_path: Path):
    write_dataset(tmp_path)
    data = RealImages(Dataset.open(DatasetConfig(root=tmp_path, split="train")), 8, 1.0)
    noisy = Corrupted(data, "speckle_noise", 5, "imagenet-c", 3, torch.device("cpu"))
    whole = noisy[0:10]
    assert torch.equal(torch.cat([noisy[:3], noisy[3:4], noisy[4:]]), whole)
    assert len(noisy[:1]) == 1 and torch.equal(noisy[:1], whole[:1])  # a process without rows of its own
    assert not torch.equal(whole, data.images)
    other = Corrupted(data, "speckle_noise", 5, "imagenet-c", 4, torch.device("cpu"))
    assert not torch.equal(other[0:10], whole)
    blurred = Corrupted(data, "gaussian_blur", 2, "cifar-c", 3, torch.device("cpu"))
    assert torch.equal(blurred.images[2:4], gaussian_blur(data.images[2:4], 0.6))
    assert torch.equal(blurred.labels, data.labels)
