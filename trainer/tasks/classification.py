"""Image classification with the built-in CNN or any timm model (GenDataAgent 3.1).

Knows nothing of the loop, of feedback or of the service.

Shapes: B rows, S input size, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Annotated, ClassVar

import timm
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from protocol.errors import ConfigError
from trainer.eval_mode import eval_mode
from trainer.losses.cross_entropy import cross_entropy
from trainer.selection.vog import true_class_logit
from trainer.tasks.randaugment import randaugment
from trainer.tasks.small_cnn import SmallCNN

Rgb = tuple[float, float, float]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class ClassificationConfig(BaseModel):
    """The model and its input."""

    model_config = ConfigDict(extra="forbid")

    model: str = "small_cnn"  # "small_cnn" (8 to 64 px), or a timm model: "resnet50", "timm:vit_base_patch16_224", ...
    pretrained: bool = False  # timm only: start from its published weights (downloaded unless cached)
    drop_rate: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0  # dropout before the last layer
    image_size: int = Field(default=32, ge=8, le=2048)  # S, pixels; images are resized to it
    mean: Rgb | None = None  # of the channels, in [0, 1] units; None: the timm model's own, or 0.5
    std: tuple[Positive, Positive, Positive] | None = None  # like mean
    label_smoothing: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0  # 0 off; 1 forgets the label
    shift: int = Field(default=0, ge=0)  # augmentation: up to so many pixels in each direction, edges repeated; 0 off
    flip: bool = False  # augmentation: mirror left and right, half of the time; wrong for digits and text
    randaugment: int = Field(default=0, ge=0, le=14)  # augmentation: operations of RandAugment on each image; 0 off
    randaugment_magnitude: int = Field(default=9, ge=0, le=30)  # of those operations; 30 is the strongest


class Classification:
    """The task `classification` of the registry.

    Args:
        config: the table [trainer.model].
        classes: label index -> class name.

    Raises:
        ConfigError: unknown model, or weights that do not exist.
    """

    Config: ClassVar = ClassificationConfig

    def __init__(self, config: ClassificationConfig, classes: Sequence[str]):
        self.config = config
        self.classes = tuple(classes)
        self._timm_name = None if config.model == "small_cnn" else config.model.removeprefix("timm:")
        if self._timm_name is None:
            mean = std = (0.5, 0.5, 0.5)
            if config.pretrained:
                raise ConfigError("small_cnn has no pretrained weights: set pretrained = false", param="pretrained")
        else:
            published = _published(self._timm_name)
            mean, std = published.mean, published.std
            self._fixed_size = published.fixed_input_size
        self._mean, self._std = torch.tensor(config.mean or mean), torch.tensor(config.std or std)

    def build_model(self) -> nn.Module:
        """A new model on the CPU with one output a class.

        Raises:
            ConfigError: pretrained weights that are neither cached nor reachable, or an image_size that the model
                cannot take.
        """
        config, classes = self.config, len(self.classes)
        if self._timm_name is None:
            return SmallCNN(classes, config.image_size, config.drop_rate)
        size = {"img_size": config.image_size} if self._fixed_size else {}
        try:
            model = timm.create_model(
                self._timm_name, pretrained=config.pretrained, num_classes=classes, drop_rate=config.drop_rate, **size
            )
        except (OSError, RuntimeError) as error:
            raise ConfigError(
                f"cannot get the weights of {self._timm_name!r}: {error}. Download them on a machine with network into"
                " HF_HOME, or set pretrained = false",
                param="pretrained",
            ) from error
        self._check_size(model)
        return model

    def _check_size(self, model: nn.Module) -> None:
        size = self.config.image_size
        try:
            self.predict(model, torch.zeros(1, 3, size, size))
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(
                f"{self._timm_name!r} cannot take images of {size} pixels ({error}): set image_size to the "
                "model's own, or to another multiple of its patch or stride",
                param="image_size",
            ) from error

    def preprocess(self, images: Tensor) -> Tensor:
        """Normalised float32 [B, 3, S, S] of uint8 [B, S, S, 3]."""
        x = images.permute(0, 3, 1, 2).float() / 255
        mean, std = self._mean.to(x.device), self._std.to(x.device)
        return (x - mean[:, None, None]) / std[:, None, None]

    def augment(self, x: Tensor, generator: torch.Generator, first: int = 0, total: int | None = None) -> Tensor:
        """Each row of x [B, 3, S, S] on its own: RandAugment, shifted, mirrored; see `Task.augment`."""
        drawn, own = len(x) if total is None else total, slice(first, first + len(x))
        if self.config.randaugment:
            seeds = torch.randint(2**62, (drawn,), generator=generator, device=generator.device)[own]
            x = self._randaugmented(x, seeds)
        if self.config.shift or self.config.flip:
            x = self._moved(x, generator, drawn, own)
        return x

    def _randaugmented(self, x: Tensor, seeds: Tensor) -> Tensor:
        mean, std = self._mean.to(x.device), self._std.to(x.device)
        images = ((x * std[:, None, None] + mean[:, None, None]) * 255).round().clamp(0, 255).to(torch.uint8)
        config, fill = self.config, (255 * self._mean).tolist()
        images = randaugment(
            images, seeds.tolist(), ops=config.randaugment, magnitude=config.randaugment_magnitude, fill=fill
        )
        return self.preprocess(images.permute(0, 2, 3, 1))

    def _moved(self, x: Tensor, generator: torch.Generator, drawn: int, own: slice) -> Tensor:
        """Each row shifted and mirrored, all by one gather."""
        shift, (batch, channels, height, width) = self.config.shift, x.shape
        offsets = torch.randint(-shift, shift + 1, (2, drawn, 1), generator=generator, device=generator.device)
        dy, dx = offsets[:, own].to(x.device)
        rows = (torch.arange(height, device=x.device) + dy).clamp(0, height - 1)
        columns = (torch.arange(width, device=x.device) + dx).clamp(0, width - 1)
        if self.config.flip:
            mirrored = torch.rand((drawn, 1), generator=generator, device=generator.device)[own] < 0.5
            columns = torch.where(mirrored.to(x.device), columns.flip(1), columns)
        index = torch.arange(batch, device=x.device)[:, None, None, None]
        channel = torch.arange(channels, device=x.device)[:, None, None]
        return x[index, channel, rows[:, None, :, None], columns[:, None, None, :]]

    def losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Cross entropy [B] of logits [B, C]."""
        return cross_entropy(outputs, y, label_smoothing=self.config.label_smoothing)

    def predict(self, model: nn.Module, x: Tensor) -> Tensor:
        """Logits [B, C] in eval mode, without gradients; the model's mode is restored."""
        with eval_mode(model), torch.no_grad():
            return model(x)

    def features(self, model: nn.Module, x: Tensor) -> Tensor:
        """What the last linear layer sees [B, D], in eval mode, as timm's models and small_cnn tell it."""
        if not hasattr(model, "forward_head"):
            raise ConfigError(
                "similarity needs a model that tells its features as timm's do, by forward_features(x) and "
                "forward_head(features, pre_logits=True): add these two, or use another criterion and filter",
                param="model",
            )
        with eval_mode(model), torch.no_grad():
            return model.forward_head(model.forward_features(x), pre_logits=True).flatten(1)

    def true_logit(self, outputs: Tensor, y: Tensor) -> Tensor:
        """The true class's logit [B], GenDataAgent eq. 4."""
        return true_class_logit(outputs, y)


def _published(name: str) -> timm.models.PretrainedCfg:
    """timm's record of a model: its normalisation and input size.

    Raises:
        ConfigError: timm has no such model, or no such weights of it ("model.weights").
    """
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        close = get_close_matches(architecture, ["small_cnn", *timm.list_models()], n=5)
        hint = f"close matches: {', '.join(close)}" if close else 'see timm.list_models(), or use "small_cnn"'
        raise ConfigError(f"unknown model {name!r}; {hint}", param="model")
    weights = [entry for entry in timm.list_pretrained(f"{architecture}.*") if entry.split(".")[0] == architecture]
    if "." in name and name not in weights:
        raise ConfigError(f"unknown weights {name!r}; timm has: {', '.join(weights) or 'none'}", param="model")
    return timm.get_pretrained_cfg(name)
