from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.trainer.privacy.sets import CLASSES, balanced, drawn, image_set, noisy, subject
from trainer.data.images import Frame
from trainer.privacy.assessment import Assessment, Options, assess, compare, drawn_alike, quantile_of
from trainer.privacy.spaces import pixels
from trainer.privacy.subject import Subject


def assessed(about: Subject, **options: float) -> Assessment:
    return assess(about, [pixels(about.frame)], Options.model_validate(options))


@pytest.fixture(scope="module")
def real() -> tuple[np.ndarray, np.ndarray]:
    labels = balanced(40)
    return drawn(0, labels), drawn(1, labels)


def test_a_generator_that_copies_is_found_out(real: tuple[np.ndarray, np.ndarray]):
    found = assessed(subject(*real, noisy(real[0], 2.0)))
    (by_pixels,) = found.findings
    assert found.near_copy_rate == 1.0 and found.near_copies == 120
    assert by_pixels.membership.auc > 0.99 and by_pixels.membership.auc_interval[0] > 0.95
    assert by_pixels.membership.true_positive_rate > 0.95
    for comparison in (by_pixels.overall, by_pixels.within_class):
        assert comparison.closer == 1.0
        assert comparison.median_ratio < 0.2
        assert comparison.median_ratio_interval[1] < 0.2
    assert [pair.synthetic for pair in by_pixels.closest] == [pair.train for pair in by_pixels.closest]
    assert found.warnings == []


def test_a_generator_that_draws_from_the_same_kind_is_not(real: tuple[np.ndarray, np.ndarray]):
    """Of a dozen independent ones a few intervals may miss."""
    missed = dict.fromkeys(("auc", "ratio", "closer"), 0)
    for seed in range(12):
        found = assessed(subject(*real, drawn(10 + seed, balanced(40)))).findings[0]
        low, high = found.membership.auc_interval
        missed["auc"] += not low <= 0.5 <= high
        low, high = found.overall.median_ratio_interval
        missed["ratio"] += not low <= 1.0 <= high
        low, high = found.within_class.closer_interval
        missed["closer"] += not low <= 0.05 <= high
    assert max(missed.values()) <= 2, missed


def test_the_more_is_copied_the_more_leaks(real: tuple[np.ndarray, np.ndarray]):
    areas, rates = [], []
    for part in (0.0, 0.3, 0.6, 1.0):
        made = drawn(2, balanced(40))
        copied = np.random.default_rng(0).permutation(120)[: int(part * 120)]
        made[copied] = noisy(real[0], 2.0)[copied]
        found = assessed(subject(*real, made))
        areas.append(found.findings[0].membership.auc)
        rates.append(found.near_copy_rate)
    assert areas == sorted(areas) and areas[-1] > 0.99
    assert rates == pytest.approx([0.0, 0.3, 0.6, 1.0])


def flat(*greys: int) -> np.ndarray:
    return np.stack([np.full((8, 8, 3), grey, dtype=np.uint8) for grey in greys])


def test_the_numbers_by_hand():
    """Flat greys, whose RMS distance is the difference of their levels over 255."""
    train, held_out, made = flat(0, 100, 200), flat(10, 120, 151), flat(1, 102, 199)
    labels = [[0, 1, 2], [0, 1, 2], [0, 1, 1]]  # 199 is near 200, which is of another class: its own is 100
    found = assessed(subject(train, held_out, made, labels), near_copy=2 / 255, quantile=0.5)
    (by_pixels,) = found.findings
    overall, within = by_pixels.overall, by_pixels.within_class
    assert overall.synthetic.quantiles[0.5] * 255 == pytest.approx(1.0)  # of 1, 1, 2
    assert overall.held_out.quantiles[0.5] * 255 == pytest.approx(20.0)  # of 10, 20, 49
    assert overall.median_ratio == pytest.approx(0.05)
    assert overall.limit * 255 == pytest.approx(20.0) and overall.closer == 1.0
    assert within.synthetic.quantiles[1.0] * 255 == pytest.approx(99.0)
    assert within.closer == pytest.approx(2 / 3)
    assert (found.near_copies, found.near_copy_rate) == (3, 1.0)
    assert by_pixels.membership.members == 3 and by_pixels.membership.classes == 3
    assert by_pixels.membership.auc == pytest.approx(1.0)  # members 1, 2, 1 away; others 9, 18, 48
    assert [(pair.synthetic_id, pair.train_id, pair.train_class) for pair in by_pixels.closest] == [
        ("made-0", "train-0", "cat"),
        ("made-2", "train-2", "fox"),
        ("made-1", "train-1", "dog"),
    ]
    assert [pair.distance * 255 for pair in by_pixels.closest] == pytest.approx([1.0, 1.0, 2.0])
    assert found.warnings == ["1 of the 3 classes have no synthetic images."]


def test_large_pictures_are_compared_small():
    about = replace(subject(flat(0, 100, 200), flat(10, 120, 150), flat(1, 102, 199)), frame=Frame(300, 100))
    found = assess(about, [pixels(about.frame)], Options())
    assert "at 64 x 64" in found.findings[0].measure
    assert found.findings[0].closest[0].distance * 255 == pytest.approx(1.0)


def test_copies_of_oblong_pictures_are_found(real: tuple[np.ndarray, np.ndarray]):
    """A generator of squares learns them stretched, and so it gives them back."""
    rng = np.random.default_rng(3)
    oblong = np.kron(rng.integers(0, 256, (3, 8, 16, 3)), np.ones((1, 8, 8, 1))).astype(np.uint8)  # 64 x 128
    made = np.stack([np.asarray(Image.fromarray(picture).resize((64, 64), Image.BICUBIC)) for picture in oblong])
    others = rng.integers(0, 256, (3, 64, 128, 3), dtype=np.uint8)
    found = assessed(replace(subject(oblong, others, made), frame=Frame(64, 64)))
    assert (found.near_copies, found.findings[0].membership.auc) == (3, 1.0)


def test_a_repeated_assessment_is_the_same(real: tuple[np.ndarray, np.ndarray]):
    about = subject(*real, drawn(2, balanced(10)))
    found, other = assessed(about), assessed(about, seed=1)
    assert assessed(about) == found
    assert found.findings[0].overall.median_ratio_interval != other.findings[0].overall.median_ratio_interval


def test_small_sets_have_wide_intervals(real: tuple[np.ndarray, np.ndarray]):
    def width(images: int) -> float:
        rows = [label * 40 + row for label in range(3) for row in range(images)]
        train, held_out = (pictures[rows] for pictures in real)
        low, high = assessed(subject(train, held_out, drawn(2, balanced(images)))).findings[0].membership.auc_interval
        return high - low

    assert width(2) > 0.5 > width(10) > width(40)


def test_other_classes_are_compared_overall_only(real: tuple[np.ndarray, np.ndarray]):
    about = subject(*real, drawn(2, balanced(40)))
    others = image_set(drawn(3, [5] * 50), [0] * 50, "held", names=("owl",))
    found = assessed(replace(about, held_out=others, same_classes=False))
    assert found.findings[0].within_class is None
    assert found.findings[0].membership.classes is None and found.findings[0].membership.members == 50
    assert "show other classes" in found.warnings[0]


def test_held_out_images_that_are_training_images_are_told(real: tuple[np.ndarray, np.ndarray]):
    leaked = real[1].copy()
    leaked[:2] = real[0][:2]
    found = assessed(subject(real[0], leaked, drawn(2, balanced(40))))
    assert found.warnings[0].startswith("2 of the held-out images are the same")


def test_without_a_yardstick_there_is_no_ratio():
    """All held-out images are training images."""
    zeros, some = torch.zeros(4, dtype=torch.float64), torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    found = compare(some, zeros, 0.05, torch.Generator().manual_seed(0))
    assert found.median_ratio is None and found.median_ratio_interval is None
    assert found.limit == 0.0 and found.closer == pytest.approx(1 / 3)  # an exact copy is never further away


def test_as_many_of_each_class_are_attacked():
    one, other = torch.tensor([0] * 7 + [1] * 2 + [2] * 3), torch.tensor([2] * 1 + [0] * 4 + [1] * 5)
    rows = drawn_alike(one, other, torch.Generator().manual_seed(0))
    assert [labels[chosen].bincount().tolist() for labels, chosen in zip((one, other), rows, strict=True)] == [
        [4, 2, 1]
    ] * 2
    assert all(chosen.unique().tolist() == chosen.tolist() for chosen in rows)
    again = drawn_alike(one, other, torch.Generator().manual_seed(1))
    assert not torch.equal(rows[0], again[0])


@pytest.mark.parametrize("part", [0.0, 0.05, 0.5, 0.77, 1.0])
def test_quantiles_are_numpys(part: float):
    values = torch.randn(3, 11, generator=torch.Generator().manual_seed(0)).double()
    assert quantile_of(values, part).numpy() == pytest.approx(np.quantile(values.numpy(), part, axis=1))
    assert quantile_of(values[0, :1], part) == values[0, 0]


def test_classes_of_the_sets_are_named():
    assert subject(flat(0, 1, 2), flat(0, 1, 2), flat(0, 1, 2)).synthetic.class_of(2) == CLASSES[2]
