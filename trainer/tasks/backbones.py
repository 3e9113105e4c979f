"""Networks by name: any timm model, or the built-in CNN. Knows nothing of tasks.

timm is imported when a model of its is named: that takes longer than all else a trainer does before it trains.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from protocol.errors import ConfigError
from trainer.eval_mode import eval_mode
from trainer.tasks.small_cnn import SmallCNN

if TYPE_CHECKING:
    from timm.models import PretrainedCfg

Rgb = tuple[float, float, float]

SMALL = "small_cnn"


@dataclass(frozen=True)
class Backbone:
    """A trained network without head and neck: `timm.create_model(name, num_classes=0, **options)` takes the state."""

    name: str  # timm's
    options: dict[str, Any]  # of create_model, as JSON knows them
    state: dict[str, Tensor]  # its state_dict; copies, on the CPU
    size: tuple[int, int]  # H, W of its input, pixels
    mean: Rgb  # of the input's channels, in [0, 1] units
    std: Rgb


@dataclass(frozen=True)
class Architecture:
    """What is known of a network before it is built."""

    timm_name: str | None  # None: the built-in CNN
    mean: Rgb = (0.5, 0.5, 0.5)  # its normalisation, in [0, 1] units
    std: Rgb = (0.5, 0.5, 0.5)
    fixed_size: bool = False  # it is built for one input size

    @classmethod
    def named(cls, name: str) -> Architecture:
        """Of "small_cnn" or a timm model, with or without "timm:" before it.

        Raises:
            ConfigError: timm has no such model, or no such weights of it ("model.weights").
        """
        if name == SMALL:
            return cls(None)
        published = _published(name.removeprefix("timm:"))
        return cls(name.removeprefix("timm:"), published.mean, published.std, published.fixed_input_size)

    def build(self, outputs: int, size: tuple[int, int], *, pretrained: bool, drop_rate: float) -> nn.Module:
        """A network on the CPU, in train mode.

        Args:
            outputs: of its head; 0: no head, the pooled features come out.
            size: H, W of its input, pixels.

        Raises:
            ConfigError: pretrained weights that are neither cached nor reachable, or a size that it cannot take.
        """
        if self.timm_name is None:
            return SmallCNN(outputs, min(size), drop_rate)
        import timm

        options = {"num_classes": outputs, "drop_rate": drop_rate} | self.options(size)
        try:
            model = timm.create_model(self.timm_name, pretrained=pretrained, **options)
        except (OSError, RuntimeError) as error:
            raise ConfigError(
                f"cannot get the weights of {self.timm_name!r}: {error}. Download them on a machine with network into"
                " HF_HOME, or set pretrained = false",
                param="pretrained",
            ) from error
        _check_size(model, self.timm_name, size)
        return model

    def options(self, size: tuple[int, int]) -> dict[str, Any]:
        """What timm wants to know to build it for that size."""
        return {"img_size": size[0] if size[0] == size[1] else list(size)} if self.fixed_size else {}

    def published(self, state: dict[str, Tensor], size: tuple[int, int], mean: Rgb, std: Rgb) -> Backbone:
        """A trained network of this architecture, by its state_dict, whose head is left out.

        Raises:
            ConfigError: it is not timm's, or the state is another network's.
        """
        if self.timm_name is None:
            raise ConfigError(
                f'{SMALL} is not a model of timm, by whose name others would build it: set model = "resnet18", or '
                "another of timm.list_models()",
                param="model",
            )
        import timm

        options = self.options(size)
        with torch.random.fork_rng(devices=[]):
            bare = timm.create_model(self.timm_name, num_classes=0, **options).state_dict()
        if missing := sorted(bare.keys() - state.keys()):
            raise ConfigError(f"the model is not timm's {self.timm_name!r}: it lacks {missing[0]}", param="model")
        kept = {name: state[name].detach().cpu().clone() for name in bare}
        return Backbone(self.timm_name, options, kept, size, mean, std)


def _check_size(model: nn.Module, name: str, size: tuple[int, int]) -> None:
    try:
        with eval_mode(model), torch.no_grad():
            model(torch.zeros(1, 3, *size))
    except (RuntimeError, AssertionError) as error:
        told = size[0] if size[0] == size[1] else f"{size[0]} x {size[1]}"
        raise ConfigError(
            f"{name!r} cannot take images of {told} pixels ({error}): set image_size to the "
            "model's own, or to another multiple of its patch or stride",
            param="image_size",
        ) from error


def _published(name: str) -> PretrainedCfg:
    """timm's record of a model: its normalisation and input size."""
    import timm

    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        close = get_close_matches(architecture, [SMALL, *timm.list_models()], n=5)
        hint = f"close matches: {', '.join(close)}" if close else f'see timm.list_models(), or use "{SMALL}"'
        raise ConfigError(f"unknown model {name!r}; {hint}", param="model")
    weights = [entry for entry in timm.list_pretrained(f"{architecture}.*") if entry.split(".")[0] == architecture]
    if "." in name and name not in weights:
        raise ConfigError(f"unknown weights {name!r}; timm has: {', '.join(weights) or 'none'}", param="model")
    return timm.get_pretrained_cfg(name)
