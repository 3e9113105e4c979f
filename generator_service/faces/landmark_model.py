"""A model of 68 facial landmarks and of whether there is a face: a timm backbone, and a head over its feature map.

A checkpoint is a folder: `config.json` (`Card`) and `model.safetensors`. Who has annotated faces makes one with
`landmark_training`. Knows nothing of action units. It finds no faces in large pictures: a frame shows one face, which
fills a good part of it, as the frames of face and expression sets do.

    N frames, H W pixels, S pixels a side of the model's input
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import timm
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from generator_service.faces.interface import POINTS
from protocol.errors import ConfigError

CARD, WEIGHTS = "config.json", "model.safetensors"
ROWS = 64  # frames in one forward pass
REACH = 0.25  # of the input's side: how far a unit of the head's output moves a landmark


class Card(BaseModel):
    """What a checkpoint's config.json says."""

    model_config = ConfigDict(extra="forbid")

    model: str  # timm's name of the backbone, one that gives feature maps (`features_only`)
    stage: int = Field(ge=0, le=5)  # whose feature map is read: each later one is half as fine
    size: int = Field(ge=16, le=1024)  # S; frames are resized to it
    channels: int = Field(default=16, ge=1, le=256)  # that the head keeps of each place of the map
    mean: tuple[float, float, float]  # of the colours, in [0, 1] units
    std: tuple[float, float, float]
    shape: list[tuple[float, float]] = Field(min_length=POINTS, max_length=POINTS)  # the mean face that landmarks are
    # predicted from, as parts of the input's side
    neutral: list[tuple[float, float]] = Field(min_length=POINTS, max_length=POINTS)  # a neutral face of the population
    # that the model was trained on, of any size and position


class Network(nn.Module):
    """The backbone and its head."""

    def __init__(self, card: Card, *, pretrained: bool = False):
        super().__init__()
        self.backbone = timm.create_model(
            card.model, pretrained=pretrained, features_only=True, out_indices=(card.stage,)
        )
        (width,), (stride,) = self.backbone.feature_info.channels(), self.backbone.feature_info.reduction()
        side = -(-card.size // stride)
        self.narrow = nn.Conv2d(width, card.channels, 1)
        self.head = nn.Linear(card.channels * side * side, 2 * POINTS + 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("shape", torch.tensor(card.shape), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of normalised [B, 3, S, S]: logit of a face [B], and landmarks [B, 68, 2] as parts of the side."""
        (features,) = self.backbone(x)
        found = self.head(F.gelu(self.narrow(features)).flatten(1))
        return found[:, 0], self.shape + REACH * found[:, 1:].unflatten(1, (POINTS, 2))


class LandmarkModel:
    """A checkpoint in use."""

    def __init__(self, card: Card, network: Network, device: torch.device | str, digest: str):
        self.card, self.digest = card, digest
        self.neutral = np.array(card.neutral)  # float64 [68, 2]
        self._network, self._device = network.to(device).eval().requires_grad_(False), torch.device(device)

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> LandmarkModel:
        """Raises ConfigError when the folder holds no such checkpoint."""
        advice = (
            "name the folder of a landmark model, as train_landmarks of generator_service.faces.landmark_training "
            "writes it"
        )
        try:
            card = Card.model_validate_json((folder / CARD).read_bytes())
            content = (folder / WEIGHTS).read_bytes()
            with torch.random.fork_rng(devices=[]):
                network = Network(card)
            network.load_state_dict(load(content))
        except OSError as error:
            raise ConfigError(f"{folder} cannot be read ({error.strerror}): {advice}") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise ConfigError(f"{folder / CARD} is wrong ({where}: {first['msg']}): {advice}") from error
        except (SafetensorError, RuntimeError) as error:  # timm knows no such model, or other tensors than its
            raise ConfigError(f"{folder} does not fit timm's model ({str(error)[:300]}): {advice}") from error
        return cls(card, network, device, hashlib.sha256(card.model_dump_json().encode() + content).hexdigest())

    def save(self, folder: Path) -> None:
        """Write a checkpoint; the folder is made when missing."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: value.cpu().contiguous() for name, value in self._network.state_dict().items()}, folder / WEIGHTS
        )
        (folder / CARD).write_text(json.dumps(self.card.model_dump(mode="json"), indent=1) + "\n")

    @torch.inference_mode()
    def __call__(self, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """
        Args:
            frames: uint8 RGB [N, H, W, 3].

        Returns:
            presence float64 [N] in [0, 1], and landmarks float64 [N, 68, 2], x and y in pixels of the frames.
        """
        presence, landmarks = np.empty(len(frames)), np.empty((len(frames), POINTS, 2))
        for start in range(0, len(frames), ROWS):
            rows = slice(start, start + ROWS)
            logits, points = self._network(inputs(frames[rows], self.card, self._device))
            presence[rows] = torch.sigmoid(logits.double()).cpu().numpy()
            landmarks[rows] = points.double().cpu().numpy()
        return presence, landmarks * np.array(frames.shape[2:0:-1])


def inputs(frames: np.ndarray, card: Card, device: torch.device | str) -> Tensor:
    """Normalised float32 [N, 3, S, S] of uint8 [N, H, W, 3]."""
    x = torch.tensor(frames, device=device).permute(0, 3, 1, 2).float() / 255
    if x.shape[2:] != (card.size, card.size):
        x = F.interpolate(x, (card.size, card.size), mode="bilinear", antialias=True, align_corners=False)
    mean, std = (torch.tensor(values, device=x.device)[:, None, None] for values in (card.mean, card.std))
    return (x - mean) / std
