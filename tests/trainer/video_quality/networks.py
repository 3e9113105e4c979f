"""Feature networks for tests: real classes with random weights, and TorchScript files whose features are known."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn


class Moments(nn.Module):
    """Mean of each channel over all, and of each channel's change from first to last frame: features known by hand."""

    def forward(self, x: Tensor) -> Tensor:
        change = (x[:, :, -1] - x[:, :, 0]).mean(dim=(2, 3))
        return torch.cat([x.mean(dim=(2, 3, 4)), change], dim=1)


class LikeI3D(nn.Module):
    """With the arguments of the usual `i3d_torchscript.pt`; features only when they are asked for, unscaled."""

    def forward(self, x: Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False) -> Tensor:
        if rescale:
            x = 2 * x / 255 - 1
        if resize:
            x = x[:, :, :, :1, :1]
        if not return_features:
            return torch.zeros(len(x), 400)
        return torch.stack([x.mean(dim=(1, 2, 3, 4)), torch.amax(x, dim=(1, 2, 3, 4))], dim=1)


class Wanting(nn.Module):
    def forward(self, x: Tensor, temperature: float) -> Tensor:
        return x.flatten(1) * temperature


def script(module: nn.Module, file: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.script(module).save(str(file))
    return file


def torchvision_weights(name: str, file: Path) -> Path:
    """Random weights of a torchvision network."""
    torch.manual_seed(0)
    torch.save(torchvision.models.get_model(name).state_dict(), file)
    return file


def video_mae(folder: Path, frames: int = 4, size: int = 16) -> Path:
    """A tiny VideoMAE with random weights, as `save_pretrained` leaves it."""
    from transformers import VideoMAEConfig, VideoMAEModel

    torch.manual_seed(0)
    config = VideoMAEConfig(
        image_size=size,
        patch_size=8,
        num_frames=frames,
        tubelet_size=2,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        use_mean_pooling=False,
    )
    VideoMAEModel(config).save_pretrained(folder)
    told = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.5]}
    (folder / "preprocessor_config.json").write_text(json.dumps(told))
    return folder


def timm_folder(folder: Path) -> Path:
    """A small timm network with random weights, as a folder that `timm:local-dir:FOLDER` names."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    folder.mkdir(parents=True)
    model = timm.create_model("resnet10t", num_classes=2)
    save_file(model.state_dict(), folder / "model.safetensors")
    told = {"input_size": [3, 32, 32], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "num_classes": 2}
    (folder / "config.json").write_text(
        json.dumps({"architecture": "resnet10t", "num_classes": 2, "pretrained_cfg": told})
    )
    return folder
