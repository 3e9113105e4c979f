import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from generator_service.backends.guidance import frame_guidance
from protocol.video import GuidanceCurve


def test_of_four_frames_by_hand():
    """7 + 4 (m/4)(1 - m/4): the product is 3/16, 4/16, 3/16 and 0."""
    np.testing.assert_allclose(frame_guidance(GuidanceCurve(), 4), [7.75, 8.0, 7.75, 7.0])


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (3.0, 2.0, [3 / 64, 8 / 64, 9 / 64, 0]),  # (m/4)^2 (1 - m/4)
        (2.0, 3.0, [9 / 64, 8 / 64, 3 / 64, 0]),  # (m/4) (1 - m/4)^2
        (1.0, 2.0, [3 / 4, 2 / 4, 1 / 4, 0]),
        (2.0, 1.0, [1 / 4, 2 / 4, 3 / 4, 1]),  # the last factor is 0^0 = 1
        (1.0, 1.0, [1, 1, 1, 1]),
    ],
)
def test_the_pairs_by_hand(a, b, expected):
    curve = GuidanceCurve(minimum=0.0, maximum=64.0, a=a, b=b)
    np.testing.assert_allclose(frame_guidance(curve, 4), 64 * np.array(expected), atol=1e-12)


@pytest.mark.parametrize(
    ("a", "b", "largest"),
    [(2.0, 2.0, 1 / 4), (3.0, 2.0, 4 / 27), (2.0, 3.0, 4 / 27), (1.0, 3.0, 1.0), (1.0, 1.0, 1.0)],
)
def test_normalised_by_its_peak(a, b, largest):
    """The largest of x^2 (1 - x) is at 2/3, where it is 4/27."""
    curve = GuidanceCurve(minimum=1.0, maximum=3.0, a=a, b=b)
    printed = frame_guidance(curve, 16)
    normalised = frame_guidance(curve.model_copy(update={"peak_normalised": True}), 16)
    np.testing.assert_allclose(normalised - 1, (printed - 1) / largest, rtol=1e-12)


@given(
    frames=st.integers(2, 200),
    a=st.floats(1, 20),
    b=st.floats(1, 20),
    low=st.floats(0, 50),
    rise=st.floats(0, 50),
    peak_normalised=st.booleans(),
)
def test_stays_between_minimum_and_maximum(frames, a, b, low, rise, peak_normalised):
    curve = GuidanceCurve(minimum=low, maximum=low + rise, a=a, b=b, peak_normalised=peak_normalised)
    values = frame_guidance(curve, frames)
    assert values.shape == (frames,) and np.isfinite(values).all()
    assert (values >= low - 1e-9).all() and (values <= low + rise + 1e-9).all()
