"""A tiny dataset of clips: a square that moves, whose direction is the class. Every class looks alike in each frame."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from protocol import codec
from protocol.dataset import DatasetConfig

SIDE, FRAMES = 16, 5
MOVES = {"left": (0, -2), "right": (0, 2), "down": (2, 0)}


def moving(name: str, seed: int, frames: int = FRAMES, side: int = SIDE) -> np.ndarray:
    """uint8 [M, side, side, 3]: a square from about the middle on, on noise."""
    draw = np.random.default_rng(seed)
    clip = np.repeat(draw.integers(0, 60, (1, side, side, 3), dtype=np.uint8), frames, axis=0)
    top, left = draw.integers(side // 2 - 3, side // 2 + 1, 2)
    for index in range(frames):
        step = index - frames // 2
        y, x = (int(at + step * move) for at, move in zip((top, left), MOVES[name], strict=True))
        clip[index, max(y, 0) : max(y + 4, 0), max(x, 0) : max(x + 4, 0)] = 230
    return clip


def write_clip(folder: Path, clip: np.ndarray) -> None:
    folder.mkdir(parents=True)
    for index, frame in enumerate(clip):
        (folder / f"{index}.png").write_bytes(codec.image_to_bytes(frame))


def write_clips(root: Path, each: dict[str, int], split: str = "train", seed: int = 0) -> DatasetConfig:
    """Class folders of folders of frames: so many clips of each class."""
    for label, (name, count) in enumerate(each.items()):
        for number in range(count):
            write_clip(root / split / name / f"{number:03d}", moving(name, seed + 1000 * label + number))
    return DatasetConfig(root=root, split=split, layout="clips")
