"""Geometry of action units: what moves each, that nothing else does, and that place, size and roll do not matter."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from generator_service.faces.action_units import UNITS, aligned, intensities, measured
from tests.generator_service.faces.drawn import WHO, face

NEUTRAL = face()[None]


def read(points: np.ndarray) -> dict[str, float]:
    return dict(zip(UNITS, intensities(points[None], NEUTRAL)[0], strict=True))


def test_a_neutral_face_shows_nothing():
    assert not intensities(NEUTRAL, NEUTRAL).any()


def test_lengths_are_in_eye_distances():
    found = measured(100 * NEUTRAL + 7)
    assert found.brow_gap == pytest.approx(0.4)  # the drawn brows' inner ends lie 0.2 from the middle
    assert found.width == pytest.approx(0.84 * WHO.mouth)
    assert found.upper_lid == pytest.approx(0.15 * WHO.eye)


@pytest.mark.parametrize(
    ("points", "move", "expected"),
    [
        ([20, 21, 22, 23], (0, -0.08), {"AU01": 0.5}),
        ([17, 18, 25, 26], (0, -0.16), {"AU02": 1.0}),
        ([20, 21, 22, 23], (0, 0.05), {"AU04": 0.25}),
        ([22], (-0.06, 0), {"AU04": 0.25}),
        ([37, 38, 43, 44], (0, -0.04), {"AU05": 0.5}),
        ([40, 41, 46, 47], (0, -0.02), {"AU07": 0.4}),
        ([31, 35], (0, -0.04), {"AU09": 0.5}),
        ([50, 51, 52, 61, 62, 63], (0, -0.05), {"AU10": 0.5, "AU25": 0.05 / 0.12}),
        ([48, 54], (0, -0.07), {"AU12": 0.5}),
        ([48, 54], (0, 0.03), {"AU15": 0.25}),
        ([54], (0.1, 0), {"AU20": 0.4}),
        ([8], (0, 0.15), {"AU26": 0.5, "AU12": 0.05 / 0.14}),  # the corners would have come down with the chin
        ([65, 66, 67, 56, 57, 58], (0, 0.06), {"AU25": 0.5}),
    ],
)
def test_how_far_a_part_moves_is_how_strong_its_unit_is(points, move, expected):
    moved = face()
    moved[points] += move
    found = read(moved)
    assert {unit: value for unit, value in found.items() if value > 1e-9} == pytest.approx(expected)


def test_lower_lids_that_rise_are_cheeks_in_a_smile_and_tight_lids_without():
    moved = face()
    moved[[40, 41, 46, 47], 1] -= 0.03
    assert read(moved)["AU07"] == pytest.approx(0.6) and read(moved)["AU06"] == 0
    moved[[48, 54], 1] -= 0.14
    assert read(moved)["AU06"] == pytest.approx(0.6) and read(moved)["AU07"] == 0


@pytest.mark.parametrize(
    "unit", ["AU01", "AU02", "AU04", "AU05", "AU07", "AU09", "AU12", "AU15", "AU20", "AU23", "AU26", "AU45"]
)
def test_units_that_are_drawn_are_read_in_their_order(unit):
    """Of faces drawn by other rules than ours: stronger reads stronger, and it is among the strongest there."""
    weak, strong = read(face(**{unit: 0.6})), read(face(**{unit: 0.9}))
    assert 0.1 < weak[unit] < strong[unit]
    assert strong[unit] >= 0.6 * max(strong.values())


faces = st.builds(
    lambda values: face(**dict(zip(("AU01", "AU04", "AU09", "AU12", "AU20", "AU26"), values, strict=True))),
    st.lists(st.floats(0, 1), min_size=6, max_size=6),
)


@settings(max_examples=40)
@given(faces, st.floats(-3.1, 3.1), st.floats(0.5, 300), st.floats(-500, 500), st.floats(-500, 500))
def test_place_size_and_roll_do_not_matter(points, roll, size, x, y):
    turn = np.array([[np.cos(roll), -np.sin(roll)], [np.sin(roll), np.cos(roll)]])
    elsewhere = size * points @ turn + np.array([x, y])
    np.testing.assert_allclose(aligned(elsewhere[None]), aligned(points[None]), atol=1e-8)
    expected = intensities(points[None], NEUTRAL)
    np.testing.assert_allclose(intensities(elsewhere[None], NEUTRAL), expected, atol=1e-6)
    np.testing.assert_allclose(intensities(points[None], size * NEUTRAL @ turn + y), expected, atol=1e-6)


def test_each_face_has_its_own_neutral():
    both = np.stack([face(AU12=1.0), face(AU12=1.0)])
    found = intensities(both, np.stack([face(), face(AU12=1.0)]))
    assert found[0, UNITS.index("AU12")] == 1.0
    assert not found[1].any()


def test_a_face_without_extent_is_not_measured():
    assert np.isnan(intensities(np.ones((1, 68, 2)), NEUTRAL)).all()
    assert np.isnan(intensities(np.full((1, 68, 2), np.nan), NEUTRAL)).all()
