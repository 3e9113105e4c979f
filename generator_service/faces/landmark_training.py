"""Trains a model of facial landmarks on annotated faces, for whoever has some.

Each step draws frames anew: shifted, turned, scaled and mirrored, with other light; and broken ones, whose tiles are
out of order or which are noise, so that what no longer shows a face is told from what does. Knows nothing of files
beyond the checkpoint that it writes.

    N frames, B rows of a step, S pixels a side of the model's input
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from generator_service.backends.device import Device, pick_device
from generator_service.faces.action_units import EYES, aligned
from generator_service.faces.interface import POINTS
from generator_service.faces.landmark_model import Card, LandmarkModel, Network, inputs
from protocol.errors import InvalidRequest

SHIFT, TURN, SCALE = 0.08, 0.2, 0.12  # greatest: parts of the side, radians, part of the size
LIGHT = 0.25  # greatest change of brightness and contrast, as parts
TILES = 4  # a side, of what is put out of order
MIRRORED = np.array(  # the landmark that each becomes in the mirror
    [
        *(*range(16, -1, -1), *range(26, 16, -1), *range(27, 31), *range(35, 30, -1)),  # jaw, brows, nose
        *(45, 44, 43, 42, 47, 46, 39, 38, 37, 36, 41, 40),  # eyes
        *(*range(54, 47, -1), *range(59, 54, -1), *range(64, 59, -1), *range(67, 64, -1)),  # lips
    ]
)


def train_landmarks(
    images: np.ndarray,
    landmarks: np.ndarray,
    presence: np.ndarray,
    folder: Path,
    *,
    steps: int = 2000,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    seed: int = 0,
    model: str = "resnet18",
    stage: int = 2,
    size: int = 64,
    pretrained: bool = False,
    broken: float = 0.2,
    neutral: np.ndarray | None = None,
    device: Device = "auto",
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> LandmarkModel:
    """Train, and write the checkpoint.

    Args:
        images: uint8 RGB [N, H, W, 3].
        landmarks: float [N, 68, 2], x and y in pixels, in the order of 300-W; without a face, anything.
        presence: bool [N], whether there is a face. Those without are welcome, and need not be there.
        folder: of the checkpoint; made when missing.
        model: timm's name of the backbone. stage: whose feature map is read, `Card.stage`.
        size: S. pretrained: start from timm's weights.
        broken: part of the rows that are faces put out of order, or noise, and count as none.
        neutral: bool [N], which faces are neutral: their mean is the population's neutral face; None: all are.
        on_step: called with the steps done and the loss of the last.

    Raises:
        InvalidRequest: no faces, or arrays that do not belong together.
    """
    at_rest = presence if neutral is None else presence & neutral
    _check(images, landmarks, presence, at_rest)
    card = _card(model, stage, size, landmarks[presence] / _sides(images), landmarks[at_rest])
    place = pick_device(device)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = Network(card, pretrained=pretrained).to(place)
    draw = _drawing(images, landmarks, presence, card, batch_size, broken, torch.Generator().manual_seed(seed))
    _fit(network, draw, steps, learning_rate, on_step)
    LandmarkModel(card, network, place, "").save(folder)
    return LandmarkModel.load(folder, place)


def _sides(images: np.ndarray) -> np.ndarray:
    """(width, height)."""
    return np.array(images.shape[2:0:-1])


def _card(model: str, stage: int, size: int, parts: np.ndarray, at_rest: np.ndarray) -> Card:
    return Card(
        model=model,
        stage=stage,
        size=size,
        mean=(0.485, 0.456, 0.406),  # ImageNet's, for pretrained backbones
        std=(0.229, 0.224, 0.225),
        shape=parts.mean(axis=0).tolist(),
        neutral=aligned(at_rest).mean(axis=0).tolist(),
    )


def _drawing(
    images: np.ndarray,
    landmarks: np.ndarray,
    presence: np.ndarray,
    card: Card,
    count: int,
    broken: float,
    draws: torch.Generator,
) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    """What draws the rows of a step: pictures [B, 3, S, S], landmarks [B, 68, 2] as parts of the side, and whether
    there is a face [B]."""
    rows = torch.cat([inputs(images[start : start + 256], card, "cpu") for start in range(0, len(images), 256)])
    faces = torch.from_numpy(presence)
    parts = torch.tensor(landmarks / _sides(images), dtype=torch.float32).nan_to_num()

    def draw() -> tuple[Tensor, Tensor, Tensor]:
        chosen = torch.randint(len(rows), (count,), generator=draws)
        x, points = moved(rows[chosen], parts[chosen], draws)
        cut = torch.rand(count, generator=draws) < broken
        x[cut] = _broken(x[cut], draws)
        return _lit(x, draws), points, faces[chosen] & ~cut

    return draw


def _fit(
    network: Network,
    draw: Callable[[], tuple[Tensor, Tensor, Tensor]],
    steps: int,
    learning_rate: float,
    on_step: Callable[[int, float], None],
) -> None:
    """AdamW, the learning rate on half a cosine down to 0."""
    place = next(network.parameters()).device
    optimiser = torch.optim.AdamW(network.parameters(), learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    network.train()
    for step in range(steps):
        x, points, there = (part.to(place) for part in draw())
        loss = _loss(*network(x), points, there)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        on_step(step + 1, loss.item())


def error(model: LandmarkModel, images: np.ndarray, landmarks: np.ndarray) -> float:
    """Mean distance between found and true landmarks, in inter-ocular distances (the normalised mean error)."""
    _, found = model(images)
    left, right = (landmarks[:, corners].mean(axis=1) for corners in EYES)
    eyes = np.linalg.norm(right - left, axis=1)
    return float((np.linalg.norm(found - landmarks, axis=2).mean(axis=1) / eyes).mean())


def _check(images: np.ndarray, landmarks: np.ndarray, presence: np.ndarray, at_rest: np.ndarray) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or landmarks.shape != (len(images), POINTS, 2):
        raise InvalidRequest(
            f"images must be uint8 [N, H, W, 3] and landmarks [N, {POINTS}, 2]; they are {images.dtype} "
            f"{list(images.shape)} and {list(landmarks.shape)}"
        )
    if presence.shape != (len(images),) or presence.dtype != bool:
        raise InvalidRequest(f"presence must be bool [{len(images)}]; it is {presence.dtype} {list(presence.shape)}")
    if not at_rest.any() or not np.isfinite(landmarks[presence]).all():
        raise InvalidRequest("there must be faces, neutral ones among them, and the landmarks of each must be finite")


def _loss(logits: Tensor, found: Tensor, points: Tensor, there: Tensor) -> Tensor:
    """Mean distance of the landmarks where there is a face, in hundredths of the side, and the cross-entropy of whether
    there is."""
    distance = (found - points).abs().mean(dim=(1, 2))
    placed = 100 * (distance * there).sum() / there.sum().clamp(min=1)
    return placed + F.binary_cross_entropy_with_logits(logits, there.float())


def moved(x: Tensor, points: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows [B, 3, S, S] and their landmarks [B, 68, 2] (parts of the side), each shifted, turned, scaled, and every
    other one mirrored. Beyond the edge the edge is repeated."""
    count = len(x)
    shift = (2 * torch.rand(count, 2, generator=draws) - 1) * SHIFT
    turn = (2 * torch.rand(count, generator=draws) - 1) * TURN
    scale = 1 + (2 * torch.rand(count, generator=draws) - 1) * SCALE
    flip = torch.rand(count, generator=draws) < 0.5
    # of a place p in [-1, 1]^2 of the new picture, the place A p + t of the old one
    sign = torch.where(flip, -1.0, 1.0)
    cos, sin = scale * turn.cos(), scale * turn.sin()
    rotation = torch.stack([torch.stack([sign * cos, -sign * sin], 1), torch.stack([sin, cos], 1)], 1)
    grid = F.affine_grid(torch.cat([rotation, 2 * shift[:, :, None]], 2), list(x.shape), align_corners=False)
    pictures = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
    old = 2 * points - 1 - 2 * shift[:, None]
    new = torch.linalg.solve(rotation, old.transpose(1, 2)).transpose(1, 2)
    new = torch.where(flip[:, None, None], new[:, MIRRORED], new)
    return pictures, (new + 1) / 2


def _lit(x: Tensor, draws: torch.Generator) -> Tensor:
    """With other brightness and contrast."""
    gain, offset = (1 + LIGHT * (2 * torch.rand(2, len(x), 1, 1, 1, generator=draws) - 1)).unbind(0)
    return x * gain + (offset - 1) * 2


def _broken(x: Tensor, draws: torch.Generator) -> Tensor:
    """In turn with its tiles out of order, and noise of the picture's own colours."""
    if not len(x):
        return x
    side = x.shape[2] - x.shape[2] % TILES
    tiles = x[:, :, :side, :side].unflatten(3, (TILES, -1)).unflatten(2, (TILES, -1))  # [B, 3, T, t, T, t]
    tiles = tiles.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    order = torch.rand(len(x), TILES**2, generator=draws).argsort(1)
    tiles = torch.stack([row[permuted] for row, permuted in zip(tiles, order, strict=True)])
    mixed = tiles.unflatten(1, (TILES, TILES)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    out = x.clone()
    out[:, :, :side, :side] = mixed
    noise = torch.randn(x.shape, generator=draws) * x.std(dim=(2, 3), keepdim=True) + x.mean(dim=(2, 3), keepdim=True)
    out[1::2] = noise[1::2]
    return out
