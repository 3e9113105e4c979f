"""The world draws what it says it draws: later studies read its truths off these parameters."""

import json

import numpy as np
import pytest

from protocol import clips as files
from tests.expressions.portrait import UNITS, Identity, Pose, landmarks, render
from tests.expressions.world import EMOTIONS, PROTOTYPES, draw, people, write_dataset

WHO = Identity.drawn("somebody", 0)


def moved(unit: str) -> np.ndarray:
    """How far each landmark goes, in eye distances, when one unit is at its most."""
    one = np.zeros(len(UNITS))
    one[UNITS.index(unit)] = 1.0
    return landmarks(WHO, one) - landmarks(WHO, np.zeros(len(UNITS)))


@pytest.mark.parametrize(
    "unit, points, axis, sign",
    [
        *(("AU01", [21, 22], 1, -1), ("AU02", [17, 26], 1, -1), ("AU04", [21, 22], 1, 1)),
        *(("AU05", [37, 38, 43, 44], 1, -1), ("AU07", [37, 38, 43, 44], 1, 1), ("AU06", [40, 41, 46, 47], 1, -1)),
        *(("AU09", [31, 33, 35], 1, -1), ("AU10", [50, 51, 52], 1, -1), ("AU12", [48, 54], 1, -1)),
        *(("AU15", [48, 54], 1, 1), ("AU20", [54], 0, 1), ("AU20", [48], 0, -1), ("AU26", [8, 57, 66], 1, 1)),
        *(("AU25", [66], 1, 1), ("AU45", [37, 38, 43, 44], 1, 1)),
    ],
)
def test_a_unit_moves_the_landmarks_it_is_named_for(unit, points, axis, sign):
    assert (sign * moved(unit)[points, axis] > 0.03).all()


def test_the_picture_follows_the_landmarks():
    jaw_dropped = np.zeros(len(UNITS))
    jaw_dropped[UNITS.index("AU26")] = 1.0
    shut, points = render(WHO, np.zeros(len(UNITS)), Pose(), 96)
    opened, _ = render(WHO, jaw_dropped, Pose(), 96)
    x, y = points[66].astype(int)
    assert int(opened[y + 7, x].sum()) < int(shut[y + 7, x].sum()) - 60  # the dark of the mouth, below the teeth
    assert np.abs(opened[:40].astype(int) - shut[:40]).max() == 0  # eyes and brows stay


@pytest.mark.parametrize("emotion", EMOTIONS)
def test_a_clip_goes_from_neutral_to_its_prototype(emotion):
    clip = draw(emotion, WHO, seed=3, size=24, frames=8)
    assert not clip.units[0].any()
    acting = {unit for unit, value in zip(UNITS, clip.units[-1], strict=True) if value}
    sure = {unit for unit, (_, often) in PROTOTYPES[emotion].items() if often == 1}
    assert sure <= acting <= set(PROTOTYPES[emotion])
    again = draw(emotion, WHO, seed=3, size=24, frames=8)
    assert np.array_equal(clip.frames, again.frames) and clip.caption == again.caption


def test_a_dataset_is_written_as_it_was_drawn(tmp_path):
    drawn = write_dataset(tmp_path, seed=1, size=24, frames=4, counts={"anger": 2, "neutral": 2}, flawed=3)
    rows = [json.loads(line) for line in (tmp_path / "train" / "metadata.jsonl").read_text().splitlines()]
    assert [row["label"] for row in rows] == ["anger"] * 2 + ["neutral"] * 5
    for clip, row in zip(drawn, rows, strict=True):
        assert np.array_equal(files.read(tmp_path / clip.relative), clip.frames)
        assert (clip.relative, clip.who.name) == (f"train/{row['file_name']}", row["subject"])
    faceless, dark, blurred = drawn[4:]
    usual = drawn[0].frames.astype(float)
    assert dark.frames.mean() < 0.25 * usual.mean()
    assert np.abs(np.diff(blurred.frames.astype(float), axis=2)).max() < np.abs(np.diff(usual, axis=2)).max() / 2
    assert np.abs(np.diff(faceless.frames.astype(int), axis=2)).max() == 0


def test_splits_share_nobody():
    looks = [tuple(vars(who).values())[1:] for split in ("train", "test") for who in people(split, 0, 20)]
    assert len(set(looks)) == 40
