"""Small sets of pictures whose privacy is known: copies of the training images, or more of the same kind."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from trainer.data.images import Frame
from trainer.privacy.image_set import ImageSet
from trainer.privacy.subject import Subject

CLASSES = ("cat", "dog", "fox")
SIZE = 8


def drawn(seed: int, labels: Sequence[int], spread: float = 30.0) -> np.ndarray:
    """Pictures [N, 8, 8, 3]: of each class a pattern, and noise of their own."""
    patterns = np.random.default_rng(99).integers(60, 196, (8, SIZE, SIZE, 3))
    noise = np.random.default_rng(seed).normal(0, spread, (len(labels), SIZE, SIZE, 3))
    return np.clip(patterns[list(labels)] + noise, 0, 255).astype(np.uint8)


def noisy(pictures: np.ndarray, spread: float) -> np.ndarray:
    noise = np.random.default_rng(5).normal(0, spread, pictures.shape)
    return np.clip(pictures.astype(np.float64) + noise, 0, 255).astype(np.uint8)


def image_set(pictures: np.ndarray, labels: Sequence[int], kind: str, names: Sequence[str] = CLASSES) -> ImageSet:
    ids = [f"{kind}-{row}" for row in range(len(labels))]
    return ImageSet(torch.tensor(list(labels)), names, ids, lambda rows: [pictures[row] for row in rows])


def balanced(each: int) -> list[int]:
    return [label for label in range(len(CLASSES)) for _ in range(each)]


def subject(
    train: np.ndarray, held_out: np.ndarray, synthetic: np.ndarray, labels: Sequence[Sequence[int]] | None = None
) -> Subject:
    """`labels`: of the three; None: as many of each class."""
    of = labels or [balanced(len(pictures) // len(CLASSES)) for pictures in (train, held_out, synthetic)]
    return Subject(
        title="weights@1",
        synthetic_are="the samples <of> a test",
        train=image_set(train, of[0], "train"),
        held_out=image_set(held_out, of[1], "held"),
        synthetic=image_set(synthetic, of[2], "made"),
        classes=CLASSES,
        same_classes=True,
        train_split="train",
        held_out_split="test",
        frame=Frame(SIZE, SIZE),
    )
