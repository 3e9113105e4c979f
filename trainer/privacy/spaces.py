"""What images are compared in: their pixels, or the features of a model. Knows nothing of what is compared.

Shapes: N images, D values of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from protocol.errors import ConfigError
from trainer import checkpoint
from trainer.data.images import Frame
from trainer.eval_mode import eval_mode
from trainer.parallel import device_of
from trainer.privacy.image_set import ImageSet
from trainer.record import Record
from trainer.tasks.interface import Task

SMALL = 64  # pixels a side, at most, that are compared: as the generator service looks for near copies
BATCH = 64  # rows of one forward pass
OWN = "own"
TIMM = "timm:"
OWN_IS_BIASED = (
    "The features are those of the run's own model, which was trained on the training images and on the synthetic "
    "ones, and not on the held-out ones. It tells the former apart by class more surely, and so may draw synthetic "
    "and training images together: distances look smaller, and membership easier to infer, than the images alone "
    "would have it. Judge by a model that saw neither."
)


@dataclass(frozen=True)
class Space:
    """Vectors of images, and what a Euclidean distance between two of them is multiplied by."""

    name: str
    measure: str  # what a distance is, in words
    vectors: Callable[[ImageSet], Tensor]  # [N, D]
    scale: float = 1.0
    caution: str = ""  # what biases it


def small(frame: Frame) -> Frame:
    """The size that pixels are compared at, for images of this one: stretched to it, as generators learn them."""
    return Frame(min(frame.height, SMALL), min(frame.width, SMALL), crop=False, frames=frame.frames)


def pixels(frame: Frame) -> Space:
    """Pixels of images that are brought to this size, or a smaller one."""
    frame = small(frame)
    return Space(
        "pixels",
        f"root mean square difference of pixels in [0, 1], at {frame.width} x {frame.height}",
        lambda images: torch.cat([part.flatten(1) for part in images.in_parts(frame)]),
        scale=1 / (255 * math.prod(frame.shape) ** 0.5),
    )


def named(name: str, run: tuple[Record, Task] | None, frames: int | None = None) -> Space:
    """The space that `--features` asks for beside the pixels.

    Args:
        name: "timm:MODEL" or "own". run: its record and its task; None: no run is looked at.
        frames: of each clip, whose features are averaged; None: they are images.

    Raises:
        ConfigError: there is no such model, its weights are not to be had, or there is no run's own.
    """
    if name.startswith(TIMM):
        return _of_timm(name.removeprefix(TIMM), frames)
    if name != OWN:
        raise ConfigError(f'--features {name!r} is neither "pixels", "own" nor "timm:MODEL"', param="features")
    if run is None:
        raise ConfigError(
            '--features own is the model of a run: name a run\'s folder, or "timm:MODEL"', param="features"
        )
    return _of_run(*run)


def _of_timm(name: str, frames: int | None) -> Space:
    import timm

    try:
        model = timm.create_model(name, pretrained=True, num_classes=0)
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"cannot get the weights of timm's {name!r}: {error}. See timm.list_pretrained(); download them on a "
            "machine with network into HF_HOME; or name a folder of your own, timm:local-dir:FOLDER",
            param="features",
        ) from error
    device = device_of("auto")
    model = model.to(device)
    told = timm.data.resolve_data_config({}, model=model)
    mean, std = torch.tensor(told["mean"]), torch.tensor(told["std"])

    def compute(images: Tensor) -> Tensor:
        with eval_mode(model), torch.no_grad():
            pictures = images.flatten(0, -4)
            x = (pictures.float() / 255 - mean).div(std).permute(0, 3, 1, 2)
            features = model(x.to(device)).cpu().flatten(1)
            return features.unflatten(0, (len(images), -1)).mean(1)

    return _of_features(f"timm:{name}", Frame(*told["input_size"][1:], frames=frames), compute)


def _of_run(record: Record, task: Task) -> Space:
    state = checkpoint.load(record.folder / "checkpoints")
    if state is None:
        raise ConfigError(
            f"{record.folder} has no checkpoint, so it has no model of its own: train it, or leave --features own out",
            param="features",
        )
    device, model = device_of("auto"), task.build_model()
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise ConfigError(
            f"the checkpoint of {record.folder} is not of the model that its settings name, as where a loop of one's "
            f"own trained another: leave --features own out ({error})",
            param="features",
        ) from error
    model = model.to(device)
    space = _of_features(OWN, task.frame, lambda images: task.features(model, task.preprocess(images.to(device))).cpu())
    return Space(space.name, space.measure, space.vectors, caution=OWN_IS_BIASED)


def _of_features(name: str, frame: Frame, compute: Callable[[Tensor], Tensor]) -> Space:
    """Features scaled to length 1, so that a distance is in [0, 2]."""

    def vectors(images: ImageSet) -> Tensor:
        found = [
            compute(rows).float()
            for part in images.in_parts(frame)
            for rows in part.split(max(1, BATCH // frame.pictures))
        ]
        return F.normalize(torch.cat(found).flatten(1), dim=1)

    return Space(name, f"Euclidean distance of {name} features of length 1, in [0, 2]", vectors)
