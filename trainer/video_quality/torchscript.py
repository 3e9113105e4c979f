"""Networks that are TorchScript files, as the I3D network of the published FVD is handed on.

A TorchScript file is a program, which is run: name one that you trust. Knows nothing of what its features are for.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor

from protocol.errors import ConfigError

# What is said to a network that asks for it by these names, as the usual `i3d_torchscript.pt` does: clips come scaled
# and sized already, and it is features that are wanted, not the classes' scores
SAID = {"rescale": False, "resize": False, "return_features": True}


class Scripted:
    """Features [B, D] of clips float32 [B, 3, T, H, W] in [-1, 1], by a TorchScript file.

    The file's `forward` takes such clips, and of the arguments named in `SAID` those that its schema has. What it
    returns is flattened; it must be the same for a clip whatever else is in the batch.
    """

    def __init__(self, file: Path, device: torch.device):
        """Raises ConfigError: the file is not there, is no TorchScript, or wants more than clips."""
        if not file.is_file():
            raise ConfigError(f"there is no TorchScript file {file}: name one that is there", param="features")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch says that TorchScript will go; files stay
                self._module = torch.jit.load(file, map_location=device).eval()
        except RuntimeError as error:
            raise ConfigError(f"{file} is no TorchScript file that can be loaded: {error}", param="features") from error
        arguments = self._module.forward.schema.arguments[1:]  # without self
        self._said = {a.name: SAID[a.name] for a in arguments if a.name in SAID}
        unknown = [a.name for a in arguments[1:] if a.name not in SAID and not a.has_default_value()]
        if not arguments or unknown:
            raise ConfigError(
                f"the network in {file} wants {', '.join(unknown) or 'nothing'} beside clips: name one whose forward "
                f"takes clips, and of other arguments only {', '.join(SAID)} or such with defaults",
                param="features",
            )

    def __call__(self, clips: Tensor) -> Tensor:
        return self._module(clips, **self._said).flatten(1)
