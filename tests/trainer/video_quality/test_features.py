"""Features of clips: which frames a network sees, and how; what is read from real files; what is said of wrong ones."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor

from protocol import clips
from protocol.errors import ConfigError
from tests.trainer.video_quality import networks
from trainer.video_quality.clip_set import ClipSet
from trainer.video_quality.features import FeatureNetwork, features_of, open_network

CPU = torch.device("cpu")


def clip_set(arrays: Sequence[np.ndarray], asked: list[int] | None = None) -> ClipSet:
    def read(rows: Sequence[int], frames: int) -> list[np.ndarray]:
        if asked is not None:
            asked.append(len(rows))
        return [arrays[row][clips.spread(len(arrays[row]), frames)] for row in rows]

    return ClipSet(["joy"] * len(arrays), [None] * len(arrays), read)


def noise(n: int, frames: int = 6, size: int = 16) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (frames, size, size, 3), dtype=np.uint8) for _ in range(n)]


def plain(level: int, frames: int = 6, size: int = 12) -> np.ndarray:
    return np.full((frames, size, size, 3), level, np.uint8)


def test_torchscript_sees_so_many_frames_in_minus_one_to_one(tmp_path: Path):
    file = networks.script(networks.Moments(), tmp_path / "moments.pt")
    rising = np.stack([np.full((12, 20, 3), 25 * m, np.uint8) for m in range(10)])  # wide: its centre is cut out
    rising[..., 1] = 255
    network = open_network(f"torchscript:{file}", CPU, frames=4, size=8)
    found = features_of(network, clip_set([rising, plain(0)]), batch_size=8)
    chosen = [1, 3, 6, 8]
    level = 2 * np.mean([25 * m for m in chosen]) / 255 - 1
    assert clips.spread(10, 4) == chosen
    assert found[0].tolist() == pytest.approx([level, 1.0, level, 2 * 175 / 255, 0.0, 2 * 175 / 255], abs=1e-6)
    assert found[1].tolist() == pytest.approx([-1.0, -1.0, -1.0, 0.0, 0.0, 0.0], abs=1e-6)


def test_torchscript_defaults_are_those_of_i3d_and_its_arguments_are_said(tmp_path: Path):
    file = networks.script(networks.LikeI3D(), tmp_path / "i3d.pt")
    network = open_network(f"torchscript:{file}", CPU)
    assert (network.frames, network.size) == (16, 224)
    found = features_of(network, clip_set([plain(255), plain(51)]), batch_size=1)
    assert found == pytest.approx(torch.tensor([[1.0, 1.0], [-0.6, -0.6]]), abs=1e-6)  # neither scaled nor sized again


def test_a_traced_network_serves_as_well(tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(networks.Moments(), torch.zeros(1, 3, 2, 4, 4)).save(str(tmp_path / "traced.pt"))
    network = open_network(f"torchscript:{tmp_path / 'traced.pt'}", CPU, frames=2, size=4)
    assert features_of(network, clip_set([plain(255)]), 1)[0].tolist() == pytest.approx([1.0] * 3 + [0.0] * 3)


@pytest.mark.parametrize("kind", ["mc3_18", "transformers"])
def test_features_are_the_same_in_any_batch_and_every_time(tmp_path: Path, kind: str):
    if kind == "transformers":
        name, frames, size = f"transformers:{networks.video_mae(tmp_path)}", None, None
    else:
        file = networks.torchvision_weights(kind, tmp_path / "weights.pth")
        name, frames, size = f"torchvision:{kind}:{file}", 4, 16
    network, asked = open_network(name, CPU, frames, size), []
    arrays = noise(5)
    together = features_of(network, clip_set(arrays, asked), batch_size=2)
    assert asked == [2, 2, 1]
    assert together == pytest.approx(features_of(open_network(name, CPU, frames, size), clip_set(arrays), 5), abs=1e-4)
    assert features_of(network, clip_set(arrays[3:4]), 1)[0] == pytest.approx(together[3], abs=1e-4)
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_torchvision_features_are_what_its_last_layer_sees(tmp_path: Path):
    file = networks.torchvision_weights("mc3_18", tmp_path / "weights.pth")
    network = open_network(f"torchvision:mc3_18:{file}", CPU, frames=4, size=16)
    assert open_network(f"torchvision:mc3_18:{file}", CPU).size == 112
    model = torchvision.models.video.mc3_18()
    model.load_state_dict(torch.load(file, weights_only=True))
    arrays = noise(1, frames=4)
    mean, std = torch.tensor([0.43216, 0.394666, 0.37645]), torch.tensor([0.22803, 0.22145, 0.216989])
    x = ((torch.from_numpy(arrays[0]) / 255 - mean) / std).permute(3, 0, 1, 2)[None]
    with torch.no_grad():
        expected = model.eval()(x)
        found = features_of(network, clip_set(arrays), 1)
        assert found.shape == (1, 512)
        assert model.fc(found) == pytest.approx(expected, abs=1e-4)


def test_transformers_features_are_its_last_states_averaged(tmp_path: Path):
    from transformers import VideoMAEModel

    folder = networks.video_mae(tmp_path)
    network = open_network(f"transformers:{folder}", CPU)
    assert (network.frames, network.size) == (4, 16)
    arrays = noise(2, frames=4)
    x = (torch.from_numpy(np.stack(arrays)) / 255 - torch.tensor([0.4, 0.5, 0.6])) / torch.tensor([0.2, 0.25, 0.5])
    with torch.no_grad():
        expected = VideoMAEModel.from_pretrained(folder).eval()(x.permute(0, 1, 4, 2, 3)).last_hidden_state.mean(1)
    assert features_of(network, clip_set(arrays), 2) == pytest.approx(expected, abs=1e-5)


def refused(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as raised:
        open_network(name, CPU)
    assert raised.value.param == "features"


def test_what_is_no_network_is_named(tmp_path: Path):
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(b"not a program")
    other = networks.script(networks.Wanting(), tmp_path / "wanting.pt")
    others = networks.torchvision_weights("squeezenet1_1", tmp_path / "squeezenet.pth")
    for name, says in (
        ("i3d", "names no network: say torchscript:FILE"),
        ("torchscript:", "names no network"),
        (f"torchscript:{tmp_path / 'none.pt'}", "there is no TorchScript file"),
        (f"torchscript:{damaged}", "is no TorchScript file"),
        (f"torchscript:{other}", "wants temperature beside clips"),
        ("torchvision:resnet18", "no 'resnet18': choose one of mc3_18"),
        (f"torchvision:mc3_18:{damaged}", "cannot read weights from"),
        (f"torchvision:mc3_18:{tmp_path / 'none.safetensors'}", "cannot read weights from"),
        (f"torchvision:mc3_18:{others}", "has no weights of mc3_18"),
        (f"transformers:{tmp_path / 'nowhere'}", "as a video network"),
    ):
        refused(name, says)


def test_published_weights_that_cannot_be_had_are_asked_for_as_a_file(monkeypatch: pytest.MonkeyPatch):
    def offline(*arguments: object, **options: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    refused("torchvision:mc3_18", "no network.*say their file, as in torchvision:mc3_18:FILE")


def test_a_network_that_cannot_take_the_clips_or_is_damaged_says_so(tmp_path: Path):
    network = open_network(f"transformers:{networks.video_mae(tmp_path)}", CPU, frames=6)
    with pytest.raises(ConfigError, match="does not take clips of 6 frames of 16 x 16 pixels"):
        features_of(network, clip_set([plain(0)]), 1)

    def broken(x: Tensor) -> Tensor:
        return torch.full((len(x), 2), torch.nan)

    network = FeatureNetwork("broken", 2, 4, (0.5,) * 3, (0.5,) * 3, broken, CPU)
    with pytest.raises(ConfigError, match="NaN or infinite"):
        features_of(network, clip_set([plain(0)]), 1)
