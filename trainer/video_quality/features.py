"""Feature networks of Frechet distances, by name, and the features of a set of clips.

    torchscript:FILE             an I3D network, say; clips [B, 3, T, 224, 224] in [-1, 1], see `torchscript`
    torchvision:NAME[:FILE]      a video network of torchvision, before its last layer; weights: as published, or this
    transformers:FOLDER_OR_ID    a video network of transformers (VideoMAE, TimeSformer, ViViT): last states, averaged

Distances of different networks cannot be compared; the papers' are of the I3D network. Nothing is random, and a clip's
features do not depend on its batch-mates. Knows nothing of what the features are for.

Shapes: N clips of a set, B of a batch, T frames, H W pixels, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from protocol.errors import ConfigError
from trainer.data.images import Frame
from trainer.video_quality import published
from trainer.video_quality.clip_set import ClipSet
from trainer.video_quality.torchscript import Scripted

I3D_SIZE = 224  # pixels a side
FRAMES = 16  # of each clip, as the paper takes them, where the network does not fix their number
HEADS = ("fc", "head", "classifier")  # the last layer of torchvision's video networks, by its name


@dataclass(frozen=True)
class FeatureNetwork:
    """What turns clips into features.

    Args:
        frames: T that it looks at, evenly spread over each clip. size: H = W.
        mean, std: of a channel, in [0, 1] units; clips are normalised by them.
        compute: float32 [B, 3, T, H, W] to [B, D].
    """

    name: str
    frames: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    compute: Callable[[Tensor], Tensor]
    device: torch.device

    def __call__(self, clips: Tensor) -> Tensor:
        """Features [B, D] on the CPU of uint8 [B, T, H, W, 3]. Raises ConfigError: the network does not take them."""
        x = clips.to(self.device).float() / 255
        x = (x - x.new_tensor(self.mean)) / x.new_tensor(self.std)
        try:
            with torch.no_grad():
                return self.compute(x.permute(0, 4, 1, 2, 3)).float().cpu()
        except RuntimeError as error:
            raise ConfigError(
                f"{self.name} does not take clips of {self.frames} frames of {self.size} x {self.size} pixels: set "
                f"frames and size to what it takes ({error})",
                param="features",
            ) from error


def open_network(name: str, device: torch.device, frames: int | None = None, size: int | None = None) -> FeatureNetwork:
    """The network of this name, see the module.

    Args:
        frames, size: as in `FeatureNetwork`; None: the network's own.

    Raises:
        ConfigError: there is no such network, or its weights are not to be had.
    """
    kind, _, which = name.partition(":")
    if kind not in KINDS or not which:
        raise ConfigError(
            f"features = {name!r} names no network: say torchscript:FILE, torchvision:NAME, torchvision:NAME:FILE or "
            "transformers:FOLDER_OR_ID",
            param="features",
        )
    return KINDS[kind](name, which, device, frames, size)


def features_of(network: FeatureNetwork, clips: ClipSet, batch_size: int) -> Tensor:
    """Features [N, D] of all clips in order, so many clips in memory at a time. N >= 1.

    Raises:
        ConfigError: the network does not take them, or what it makes of them is not finite.
    """
    frame = Frame(network.size, network.size, frames=network.frames)
    found = torch.cat([network(batch) for batch in clips.batches(range(len(clips)), frame, batch_size)])
    if not torch.isfinite(found).all():
        raise ConfigError(
            f"{network.name} has features that are NaN or infinite: its weights are damaged", param="features"
        )
    return found


def _torchscript(name: str, file: str, device: torch.device, frames: int | None, size: int | None) -> FeatureNetwork:
    half = (0.5, 0.5, 0.5)  # [0, 1] to [-1, 1]
    return FeatureNetwork(name, frames or FRAMES, size or I3D_SIZE, half, half, Scripted(Path(file), device), device)


def _torchvision(name: str, which: str, device: torch.device, frames: int | None, size: int | None) -> FeatureNetwork:
    import torchvision

    model_name, _, file = which.partition(":")
    known = torchvision.models.list_models(module=torchvision.models.video)
    model, published_with = published.network(model_name, file, known, "features")
    last = next(head for head in HEADS if hasattr(model, head))
    setattr(model, last, nn.Identity())
    own = size or published_with.crop_size[0]
    model.to(device)
    return FeatureNetwork(
        name, frames or FRAMES, own, tuple(published_with.mean), tuple(published_with.std), model, device
    )


def _transformers(name: str, which: str, device: torch.device, frames: int | None, size: int | None) -> FeatureNetwork:
    try:
        from transformers import AutoModel, VideoMAEImageProcessor
    except ImportError as error:
        raise ConfigError(f"{name} needs the package transformers: install it", param="features") from error
    try:
        model = AutoModel.from_pretrained(which, use_safetensors=True).to(device).eval()
        told, _ = VideoMAEImageProcessor.get_image_processor_dict(which)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot load {which!r} as a video network: {error}", param="features") from error
    config = model.config
    if not hasattr(config, "num_frames"):
        raise ConfigError(f"{which!r} is no video network: its settings name no num_frames", param="features")

    def compute(clips: Tensor) -> Tensor:
        return model(clips.transpose(1, 2)).last_hidden_state.mean(1)

    own = size or config.image_size
    mean, std = tuple(told["image_mean"]), tuple(told["image_std"])
    return FeatureNetwork(name, frames or config.num_frames, own, mean, std, compute, device)


KINDS = {"torchscript": _torchscript, "torchvision": _torchvision, "transformers": _transformers}
