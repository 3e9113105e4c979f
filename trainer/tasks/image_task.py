"""What tasks on images share, and on clips: the network by its name, normalisation and augmentation.

Shapes: B rows, M frames of a clip, H, W input size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from protocol.errors import ConfigError
from trainer.data.images import Frame
from trainer.eval_mode import eval_mode
from trainer.tasks.augmentation import moved, random_erasing
from trainer.tasks.backbones import SMALL, Architecture, Backbone, Rgb
from trainer.tasks.randaugment import randaugment

Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class ImageConfig(BaseModel):
    """The model and its input; a task adds image_size."""

    model_config = ConfigDict(extra="forbid")

    model: str = SMALL  # "small_cnn" (8 to 64 px), or a timm model: "resnet50", "timm:vit_base_patch16_224", ...
    pretrained: bool = False  # timm only: start from its published weights (downloaded unless cached)
    drop_rate: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0  # dropout before the last layer
    mean: Rgb | None = None  # of the channels, in [0, 1] units; None: the timm model's own, or 0.5
    std: tuple[Positive, Positive, Positive] | None = None  # like mean
    label_smoothing: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0  # 0 off; 1 forgets the label
    shift: int = Field(default=0, ge=0)  # augmentation: up to so many pixels in each direction, edges repeated; 0 off
    flip: bool = False  # augmentation: mirror left and right, half of the time; wrong for digits and text
    randaugment: int = Field(default=0, ge=0, le=14)  # augmentation: operations of RandAugment on each image; 0 off
    randaugment_magnitude: int = Field(default=9, ge=0, le=30)  # of those operations; 30 is the strongest
    random_erasing: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0  # augmentation: probability that noise hides a part


class ImageTask:
    """The part of a task that its kind does not change.

    Args:
        config: the table [trainer.model].
        classes: label index -> class name.

    Raises:
        ConfigError: unknown model, or weights that do not exist.
    """

    Config: ClassVar = ImageConfig

    def __init__(self, config: ImageConfig, classes: Sequence[str], frame: Frame):
        if config.model == SMALL and config.pretrained:
            raise ConfigError("small_cnn has no pretrained weights: set pretrained = false", param="pretrained")
        self.config, self.frame = config, frame
        self.classes = tuple(classes)
        self.architecture = Architecture.named(config.model)
        self._mean = torch.tensor(config.mean or self.architecture.mean)
        self._std = torch.tensor(config.std or self.architecture.std)

    def build_network(self, outputs: int) -> nn.Module:
        """The network that the settings name; arguments and errors as `Architecture.build`."""
        config = self.config
        return self.architecture.build(
            outputs, self.frame[:2], pretrained=config.pretrained, drop_rate=config.drop_rate
        )

    def width(self, network: nn.Module) -> int:
        """How many features a network without a head returns."""
        with eval_mode(network), torch.no_grad():
            return network(torch.zeros(1, 3, *self.frame[:2])).shape[1]

    def published(self, network: nn.Module) -> Backbone:
        """The network's weights, without a head. Raises ConfigError: it is not timm's."""
        mean, std = tuple(self._mean.tolist()), tuple(self._std.tolist())
        return self.architecture.published(network.state_dict(), self.frame[:2], mean, std)

    def preprocess(self, images: Tensor) -> Tensor:
        """Normalised float32 [B, 3, H, W] of uint8 [B, H, W, 3]; of clips [B, M, 3, H, W] of [B, M, H, W, 3]."""
        x = images.movedim(-1, -3).float() / 255
        mean, std = self._mean.to(x.device), self._std.to(x.device)
        return (x - mean[:, None, None]) / std[:, None, None]

    def augment(self, x: Tensor, generator: torch.Generator, first: int = 0, total: int | None = None) -> Tensor:
        """Each row of x [B, 3, H, W] on its own: RandAugment, shifted, mirrored, erased; see `Task.augment`. Of clips
        [B, M, 3, H, W] every frame alike."""
        config = self.config
        drawn, own = len(x) if total is None else total, slice(first, first + len(x))
        if config.randaugment:
            seeds = torch.randint(2**62, (drawn,), generator=generator, device=generator.device)[own]
            x = self._randaugmented(x, seeds)
        if config.shift or config.flip:
            x = moved(x, generator, drawn, own, shift=config.shift, flip=config.flip)
        if config.random_erasing:
            probability, mean, std = config.random_erasing, self._mean, self._std
            x = random_erasing(x, generator, drawn, own, probability=probability, mean=mean, std=std)
        return x

    def _randaugmented(self, x: Tensor, seeds: Tensor) -> Tensor:
        mean, std = self._mean.to(x.device), self._std.to(x.device)
        images = ((x * std[:, None, None] + mean[:, None, None]) * 255).round().clamp(0, 255).to(torch.uint8)
        config, fill = self.config, (255 * self._mean).tolist()
        images = randaugment(
            images, seeds.tolist(), ops=config.randaugment, magnitude=config.randaugment_magnitude, fill=fill
        )
        return self.preprocess(images.movedim(-3, -1))
