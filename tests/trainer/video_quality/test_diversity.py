"""Perceptual distances by hand, on real networks, and which pairs of clips are compared."""

from __future__ import annotations

import itertools
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from protocol.errors import ConfigError
from tests.trainer.video_quality import networks
from trainer.video_quality.clip_set import ClipSet
from trainer.video_quality.diversity import PerceptualNetwork, _weighted, diversity, drawn, open_perceptual

CPU = torch.device("cpu")


def by_colour(weights: list[Tensor] | None = None) -> PerceptualNetwork:
    """The pixels themselves are one layer, their mean over the image another."""

    def layers(x: Tensor) -> list[Tensor]:
        return [x, x.mean(dim=(2, 3), keepdim=True)]

    return PerceptualNetwork("colours", 2, (0.0,) * 3, (1.0,) * 3, layers, CPU, weights)


def one_colour(*colours: tuple[int, int, int]) -> np.ndarray:
    """A clip whose frames are each of one colour."""
    return np.stack([np.broadcast_to(np.array(colour, np.uint8), (2, 2, 3)) for colour in colours])


RED, GREEN, YELLOW, DARK_RED = (255, 0, 0), (0, 255, 0), (255, 255, 0), (51, 0, 0)


def test_distances_by_hand():
    def between(a: tuple[int, int, int], b: tuple[int, int, int], weights: list[Tensor] | None = None) -> float:
        pair = (torch.from_numpy(one_colour(colour)) for colour in (a, b))
        return by_colour(weights).distances(*pair).item()

    assert between(RED, RED) == 0
    assert between(RED, DARK_RED) == pytest.approx(0.0, abs=1e-9)  # of the same direction
    assert between(RED, GREEN) == pytest.approx(2 * 2.0)  # two layers, orthogonal unit vectors
    assert between(RED, YELLOW) == pytest.approx(2 * (2 - 2 / math.sqrt(2)), rel=1e-5)
    learnt = [torch.tensor([0.5, 0.0, 7.0]), torch.tensor([0.0, 3.0, 0.0])]
    assert between(RED, GREEN, learnt) == pytest.approx(0.5 + 3.0)
    assert between((0, 0, 0), RED) == pytest.approx(2.0)  # black has no direction, and nothing is divided by zero


def test_positions_are_averaged():
    half = torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
    half[0, 0, :, 0], half[0, 1, :, 1] = 255, 255  # red above, green below
    found = by_colour().distances(half, torch.from_numpy(one_colour(RED)))
    assert found.item() == pytest.approx(2.0 / 2 + (2 - 2 / math.sqrt(2)), rel=1e-5)


def clip_set(clips: list[np.ndarray], texts: list[str]) -> ClipSet:
    return ClipSet(texts, [None] * len(texts), lambda rows, frames: [clips[row][:frames] for row in rows])


def test_a_class_has_the_mean_of_its_pairs_and_frames():
    clips = [one_colour(RED, RED), one_colour(RED, GREEN), one_colour(GREEN, GREEN), one_colour(RED, RED)]
    found = diversity(by_colour(), clip_set(clips, ["joy", "joy", "joy", "fear"]), frames=2, pairs=10)
    assert found.classes == {"joy": pytest.approx(statistics.fmean([2.0, 4.0, 2.0]))}
    assert (found.mean, found.left_out, found.network) == (found.classes["joy"], ["fear"], "colours")
    none = diversity(by_colour(), clip_set(clips[:1], ["joy"]), frames=2, pairs=10)
    assert (none.mean, none.classes, none.left_out) == (None, {}, ["joy"])


def test_pairs_are_drawn_once_each_and_by_the_seed():
    rows = [2, 3, 5, 7, 11]
    assert drawn(rows, 10, 0) == list(itertools.combinations(rows, 2))
    some = drawn(rows, 6, 0)
    assert len(set(some)) == 6 and set(some) < set(itertools.combinations(rows, 2))
    assert drawn(rows, 6, 0) == some != drawn(rows, 6, 1)
    assert set(itertools.chain(*(drawn(rows, 9, seed) for seed in range(60)))) == set(itertools.combinations(rows, 2))
    many = drawn(range(100_000), 500, 0)  # of five thousand million
    assert len(set(many)) == 500 and all(first < second for first, second in many) and max(many)[0] > 50_000


def pictures(seed: int, size: int) -> Tensor:
    return torch.randint(0, 256, (2, size, size, 3), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def test_alexnet_has_the_layers_of_lpips_and_takes_its_weights(tmp_path: Path):
    file = networks.torchvision_weights("alexnet", tmp_path / "alexnet.pth")
    learnt = {
        f"lin{layer}.model.1.weight": torch.rand(1, channels, 1, 1)
        for layer, channels in enumerate((64, 192, 384, 256, 256))
    }
    save_file(learnt, tmp_path / "lpips.safetensors")
    network = open_perceptual(f"torchvision:alexnet:{file}", CPU)
    weighted = _weighted(network, tmp_path / "lpips.safetensors")
    state = torch.load(file, weights_only=True)
    a, b = pictures(0, 64), pictures(1, 64)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])

    def relus(images: Tensor) -> list[np.ndarray]:
        x = torch.from_numpy((images.numpy() / 255 - mean) / std).float().permute(0, 3, 1, 2)
        found = []
        with torch.no_grad():
            for index, (stride, padding) in {0: (4, 2), 3: (1, 2), 6: (1, 1), 8: (1, 1), 10: (1, 1)}.items():
                if index in (3, 6):
                    x = torch.nn.functional.max_pool2d(x, 3, 2)
                weight, bias = state[f"features.{index}.weight"], state[f"features.{index}.bias"]
                x = torch.nn.functional.conv2d(x, weight, bias, stride, padding).relu()
                found.append(x.numpy())
        return found

    expected, expected_weighted = np.zeros(2), np.zeros(2)
    for layer, (f, g) in enumerate(zip(relus(a), relus(b), strict=True)):
        f, g = (m / np.maximum(np.linalg.norm(m, axis=1, keepdims=True), 1e-10) for m in (f, g))
        expected += ((f - g) ** 2).sum(1).mean((1, 2))
        expected_weighted += ((f - g) ** 2 * learnt[f"lin{layer}.model.1.weight"].numpy()).sum(1).mean((1, 2))
    assert layer == 4
    assert network.distances(a, b).numpy() == pytest.approx(expected, rel=1e-4)
    assert weighted.distances(a, b).numpy() == pytest.approx(expected_weighted, rel=1e-4)


def test_timm_networks_serve_from_a_folder_and_weights_must_fit(tmp_path: Path):
    name = f"timm:local-dir:{networks.timm_folder(tmp_path / 'net')}"
    network = open_perceptual(name, CPU)
    a, b = pictures(0, 32), pictures(1, 32)
    assert network.size == 32
    assert network.distances(a, a).abs().max() == 0 and network.distances(a, b).min() > 0
    assert network.distances(a, b) == pytest.approx(network.distances(b, a))
    save_file({"lin0.model.1.weight": torch.ones(1, 9, 1, 1)}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match=r"has weights of \[9\] channels, and timm:.* layers of \[64, 64"):
        open_perceptual(name, CPU, tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("lpips", "names no image network: say timm:NAME, or torchvision:alexnet or torchvision:vgg16"),
        ("timm:no_such_network", "cannot get layers and weights of timm's 'no_such_network'"),
        ("torchvision:resnet18", "no 'resnet18': choose one of alexnet, vgg16"),
    ],
)
def test_what_is_no_image_network_is_named(name: str, says: str):
    with pytest.raises(ConfigError, match=says):
        open_perceptual(name, CPU)
