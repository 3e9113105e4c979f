"""Where a backend computes."""

from __future__ import annotations

from typing import Literal

import torch

from protocol.errors import ConfigError

Device = Literal["auto", "cpu", "cuda"]
DType = Literal["float32", "float16", "bfloat16"]


def pick_device(device: Device) -> torch.device:
    """The device that a setting stands for; "auto": the GPU where there is one. Raises ConfigError."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError('device = "cuda" but no GPU is to be seen: use "auto" or "cpu"', param="device")
    return torch.device("cuda" if torch.cuda.is_available() and device != "cpu" else "cpu")
