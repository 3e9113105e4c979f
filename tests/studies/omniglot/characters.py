"""Handwritten characters as identities: a character is an identity, its drawer the view (Omniglot, Lake et al. 2015).

One alphabet is the scarce target; the others are the general domain. Knows nothing of models.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops
from torch import Tensor

SIDE = 24  # pixels
TARGET = "Korean"
DRAWERS = 20


@dataclass(frozen=True)
class Characters:
    """N drawings: ink is white, paper black."""

    images: np.ndarray  # uint8 [N, SIDE, SIDE]
    labels: np.ndarray  # int64 [N], into names
    drawers: np.ndarray  # int64 [N], 1 to 20
    names: tuple[str, ...]  # alphabet-character

    def where(self, rows: np.ndarray, names: tuple[str, ...] | None = None) -> Characters:
        """The rows of a mask; with `names`, which must hold theirs, labelled by these."""
        kept = self.names if names is None else names
        labels = np.array([kept.index(self.names[label]) for label in self.labels[rows]], dtype=np.int64)
        return Characters(self.images[rows], labels, self.drawers[rows], kept)


def read(archive: Path, target: bool) -> Characters:
    """The target alphabet, or all others."""
    images, names, drawers = [], [], []
    with zipfile.ZipFile(archive) as files:
        for path in sorted(name for name in files.namelist() if name.endswith(".png")):
            _, alphabet, character, file = path.split("/")
            if (alphabet == TARGET) == target:
                images.append(_fitted(Image.open(io.BytesIO(files.read(path)))))
                names.append(f"{alphabet}-{character.removeprefix('character')}")
                drawers.append(int(Path(file).stem.split("_")[1]))
    known = tuple(sorted(set(names)))
    return Characters(
        np.stack(images), np.array([known.index(name) for name in names], dtype=np.int64), np.array(drawers), known
    )


def _fitted(picture: Image.Image) -> np.ndarray:
    """uint8 [SIDE, SIDE]: the ink's box, a square with a margin, reduced."""
    ink = ImageChops.invert(picture.convert("L"))
    left, top, right, bottom = ink.getbbox()
    side = round(1.15 * max(right - left, bottom - top))
    page = Image.new("L", (side, side))
    page.paste(ink.crop((left, top, right, bottom)), ((side - right + left) // 2, (side - bottom + top) // 2))
    return np.asarray(page.resize((SIDE, SIDE), Image.Resampling.BOX).point(lambda level: min(255, round(1.6 * level))))


def warped(images: Tensor, rng: torch.Generator, strength: float = 1.0) -> Tensor:
    """Images [B, 1, S, S] in [-1, 1], each turned, sheared, scaled and moved a little at random."""
    size = len(images)

    def uniform(most: float) -> Tensor:
        return strength * most * (2 * torch.rand(size, generator=rng) - 1)

    angle, shear, zoom = uniform(0.2), uniform(0.15), 1 + uniform(0.12)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    matrix = torch.stack(
        [torch.stack([cos, shear - sin, uniform(0.1)], 1), torch.stack([sin, cos, uniform(0.1)], 1)], 1
    )
    where = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, where, align_corners=False) - 1


def signed(images: np.ndarray) -> Tensor:
    """uint8 [N, S, S] -> float32 [N, 1, S, S] in [-1, 1]."""
    return torch.from_numpy(images).float()[:, None] / 127.5 - 1
