"""scikit-learn's handwritten digits as an image folder: a few per class to train on, the rest held out."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


def write_digits(root: Path, *, per_class: int, seed: int) -> None:
    """Write `root/{train,test}/{digit}/{number}.png`, 8 x 8 grey, once; a folder that is there already is kept.

    Args:
        per_class: training images of each digit, drawn with `seed`; all others are for testing.
    """
    if root.exists():
        return
    partial = root.with_name(root.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    digits = load_digits()
    draw = np.random.default_rng(seed)
    for digit in range(10):
        rows = draw.permutation(np.flatnonzero(digits.target == digit))
        for split, chosen in (("train", rows[:per_class]), ("test", rows[per_class:])):
            folder = partial / split / str(digit)
            folder.mkdir(parents=True)
            for row in chosen:
                grey = np.round(digits.images[row] * (255 / 16)).astype(np.uint8)
                Image.fromarray(grey).save(folder / f"{row:04d}.png")
    partial.rename(root)
