from __future__ import annotations

import itertools

import pytest
import torch

from trainer.tasks.augmentation import AREA, ASPECT, random_erasing
from trainer.tasks.classification import Classification, ClassificationConfig

MEAN, STD = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.25, 0.2, 0.5])


def erased(x: torch.Tensor, seed: int = 0, probability: float = 1.0, first: int = 0, total: int | None = None):
    own = slice(first, first + len(x))
    generator = torch.Generator().manual_seed(seed)
    return random_erasing(x, generator, total or len(x), own, probability=probability, mean=MEAN, std=STD)


def rectangle(changed: torch.Tensor) -> tuple[int, int, int, int]:
    """Top, left, height and width of the changed pixels [H, W], which fill it."""
    rows, columns = changed.any(1).nonzero().flatten(), changed.any(0).nonzero().flatten()
    top, left = int(rows[0]), int(columns[0])
    height, width = int(rows[-1]) - top + 1, int(columns[-1]) - left + 1
    assert changed[top : top + height, left : left + width].all() and int(changed.sum()) == height * width
    return top, left, height, width


def test_a_rectangle_of_the_published_areas_and_aspects_becomes_noise():
    x = torch.full((300, 3, 64, 32), 9.0)
    out = erased(x)
    areas, aspects, corners = [], [], set()
    for row in out:
        top, left, height, width = rectangle((row != 9.0).any(0))
        areas.append(height * width / (64 * 32))
        aspects.append(height / width)
        corners.add((top, left))
    slack = 0.05  # sides are whole pixels
    assert min(areas) > AREA[0] - slack / 3 and max(areas) < AREA[1] + slack
    assert min(aspects) > ASPECT[0] - 2 * slack and max(aspects) < ASPECT[1] * (1 + 3 * slack)
    assert max(areas) - min(areas) > 0.25 and len(corners) > 100
    colours = (out * STD[:, None, None] + MEAN[:, None, None])[out != 9.0]
    assert colours.min() >= 0.0 and colours.max() <= 1.0 and abs(colours.mean() - 0.5) < 0.02


def test_so_many_rows_are_erased():
    x = torch.zeros(1000, 3, 8, 8)
    changed = (erased(x, probability=0.3) != 0).flatten(1).any(1)
    assert abs(changed.float().mean().item() - 0.3) < 0.05
    assert torch.equal(erased(x, probability=0.0), x) and (x == 0).all()


def test_parts_of_a_batch_become_what_they_become_in_the_whole():
    x = torch.randn(7, 3, 16, 8)
    whole = erased(x, seed=3, probability=0.7)
    parts = [erased(x[a:b], 3, 0.7, a, 7) for a, b in itertools.pairwise([0, 3, 3, 7])]
    assert torch.equal(torch.cat(parts), whole)
    rng = torch.get_rng_state()
    assert not torch.equal(erased(x, seed=4, probability=0.7), whole) and torch.equal(rng, torch.get_rng_state())


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_tasks_erase_after_moving(probability: float):
    config = ClassificationConfig(image_size=16, shift=2, random_erasing=probability)
    x = torch.randn(5, 3, 16, 16)
    moved = Classification(config.model_copy(update={"random_erasing": 0.0}), ["a", "b"])
    task = Classification(config, ["a", "b"])
    one, other = (one.augment(x, torch.Generator().manual_seed(1)) for one in (task, moved))
    assert torch.equal(one, other) == (probability == 0.0)
    if probability:
        for row in (one != other).any(1):
            rectangle(row)
