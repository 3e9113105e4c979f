"""How much clips of a class differ from each other, as their perceptual distances (ARGen Table 8).

The distance is LPIPS (Zhang et al. 2018): the features of several layers of an image network, each position's scaled to
length 1 over the channels; their squared differences, weighted by channel, are summed over the channels, averaged over
the positions and summed over the layers. Without learnt weights each channel has weight 1, as in that paper's
unsupervised variant, whose distances are larger.

    timm:NAME                        any timm network that tells its layers (timm:local-dir:FOLDER: your own)
    torchvision:alexnet[:FILE]       the layers that LPIPS takes, or of vgg16; weights as published, or a file's

Knows nothing of where clips come from. Shapes: B images, L layers, C channels of a layer, H W pixels, T frames.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor, nn

from protocol.errors import ConfigError
from trainer.data.images import Frame
from trainer.video_quality import published
from trainer.video_quality.clip_set import ClipSet

TAPS = {"alexnet": (1, 4, 7, 9, 11), "vgg16": (3, 8, 15, 22, 29)}  # of torchvision's, the layers that LPIPS takes
SIZE = 224  # pixels a side of torchvision's


class Diversity(BaseModel):
    """Mean perceptual distance of pairs of clips; more is more diverse."""

    network: str
    mean: float | None  # over the classes; None: none has two clips
    classes: dict[str, float]  # class name -> mean over its pairs
    left_out: list[str]  # classes with fewer than two clips


@dataclass(frozen=True)
class PerceptualNetwork:
    """Layers of an image network.

    Args:
        size: H = W. mean, std: of a channel, in [0, 1] units; images are normalised by them.
        layers: float32 [B, 3, H, W] to L tensors [B, C, h, w].
        weights: of the channels of each layer, [C] each; None: 1 each.
    """

    name: str
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    layers: Callable[[Tensor], Sequence[Tensor]]
    device: torch.device
    weights: Sequence[Tensor] | None = None

    def distances(self, a: Tensor, b: Tensor) -> Tensor:
        """Perceptual distance [B] of images uint8 [B, H, W, 3] to as many others, on the CPU."""
        x = torch.cat([a, b]).to(self.device).float() / 255
        x = (x - x.new_tensor(self.mean)) / x.new_tensor(self.std)
        with torch.no_grad():
            found = self.layers(x.permute(0, 3, 1, 2))
        weights = self.weights or [None] * len(found)
        return sum(_distance(f.float(), w) for f, w in zip(found, weights, strict=True)).cpu()


def _distance(features: Tensor, weights: Tensor | None) -> Tensor:
    """Of one layer: [B] from [2 B, C, h, w], the first half against the second."""
    features = features / (features.square().sum(1, keepdim=True).sqrt() + 1e-10)  # all zero stays zero
    a, b = features.chunk(2)
    squared = (a - b).square()
    if weights is not None:
        squared = squared * weights.to(squared)[:, None, None]
    return squared.sum(1).mean(dim=(1, 2))


def diversity(network: PerceptualNetwork, clips: ClipSet, frames: int, pairs: int, seed: int = 0) -> Diversity:
    """Mean distance of clips of the same class, frame by frame, averaged over frames and pairs.

    Args:
        frames: T of each clip, evenly spread. pairs: of a class, at most; which ones follows from the seed.
    """
    classes, left_out = {}, []
    for name in sorted(set(clips.texts)):
        rows = [row for row, text in enumerate(clips.texts) if text == name]
        if len(rows) < 2:
            left_out.append(name)
            continue
        found = list(_of_pairs(network, clips, drawn(rows, pairs, seed), frames))
        classes[name] = statistics.fmean(found)
    mean = statistics.fmean(classes.values()) if classes else None
    return Diversity(network=network.name, mean=mean, classes=classes, left_out=left_out)


def drawn(rows: Sequence[int], most: int, seed: int) -> list[tuple[int, int]]:
    """Pairs of different rows, each pair once: all, or so many at random."""
    total = math.comb(len(rows), 2)
    if total <= most:
        return list(itertools.combinations(rows, 2))
    # by number: the list of all would fill memory where clips are many
    chosen = sorted(np.random.default_rng(seed).choice(total, most, replace=False).tolist())
    later = [(1 + math.isqrt(8 * number + 1)) // 2 for number in chosen]  # pairs (0, 1), (0, 2), (1, 2), (0, 3), ...
    return [(rows[number - math.comb(at, 2)], rows[at]) for number, at in zip(chosen, later, strict=True)]


def _of_pairs(
    network: PerceptualNetwork, clips: ClipSet, pairs: Sequence[tuple[int, int]], frames: int
) -> Iterator[float]:
    """The distance of each pair, averaged over its frames; two clips are in memory at a time."""
    frame = Frame(network.size, network.size, frames=frames)
    for pair in pairs:
        (both,) = clips.batches(pair, frame, 2)
        yield network.distances(both[0], both[1]).double().mean().item()


def open_perceptual(name: str, device: torch.device, weights: Path | None = None) -> PerceptualNetwork:
    """The network of this name, see the module.

    Args:
        weights: file with LPIPS's learnt weights of the channels; None: 1 each.

    Raises:
        ConfigError: there is no such network or no such file, or they do not fit each other.
    """
    kind, _, which = name.partition(":")
    if kind == "timm" and which:
        network = _timm(name, which, device)
    elif kind == "torchvision" and which:
        network = _torchvision(name, which, device)
    else:
        raise ConfigError(
            f"{name!r} names no image network: say timm:NAME, or torchvision:{' or torchvision:'.join(TAPS)}",
            param="diversity",
        )
    return network if weights is None else _weighted(network, weights)


def _timm(name: str, which: str, device: torch.device) -> PerceptualNetwork:
    import timm

    try:
        model = timm.create_model(which, pretrained=True, features_only=True)
    except (OSError, RuntimeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"cannot get layers and weights of timm's {which!r}: {error}. See timm.list_pretrained(); download them "
            "on a machine with network into HF_HOME; or name a folder of your own, timm:local-dir:FOLDER",
            param="diversity",
        ) from error
    told = timm.data.resolve_data_config({}, model=model)
    return PerceptualNetwork(name, told["input_size"][1], told["mean"], told["std"], model.to(device).eval(), device)


def _torchvision(name: str, which: str, device: torch.device) -> PerceptualNetwork:
    model_name, _, file = which.partition(":")
    model, told = published.network(model_name, file, list(TAPS), "diversity")
    layers = _Tapped(model.features, TAPS[model_name]).to(device)
    return PerceptualNetwork(name, SIZE, tuple(told.mean), tuple(told.std), layers, device)


class _Tapped(nn.Module):
    """What some layers of a sequence make of its input."""

    def __init__(self, sequence: nn.Sequential, taps: Sequence[int]):
        super().__init__()
        self.sequence, self.taps = sequence[: max(taps) + 1], taps

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for index, layer in enumerate(self.sequence):
            x = layer(x)
            if index in self.taps:
                found.append(x)
        return found


def _weighted(network: PerceptualNetwork, file: Path) -> PerceptualNetwork:
    """With the weights of a file of LPIPS: tensors [1, C, 1, 1] named lin0.model.1.weight, lin1..., one a layer."""
    state = published.read_state(file, "diversity_weights")
    found = [state[key].flatten() for key in sorted(state) if key.startswith("lin")]
    image = torch.zeros(1, 3, network.size, network.size, device=network.device)
    with torch.no_grad():
        channels = [layer.shape[1] for layer in network.layers(image)]
    if [len(weights) for weights in found] != channels:
        raise ConfigError(
            f"{file} has weights of {[len(weights) for weights in found]} channels, and {network.name} layers of "
            f"{channels}: name the file that was learnt for this network",
            param="diversity_weights",
        )
    return PerceptualNetwork(
        network.name, network.size, network.mean, network.std, network.layers, network.device, found
    )
