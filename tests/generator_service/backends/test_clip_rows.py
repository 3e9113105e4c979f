from generator_service.backends import clip_rows
from generator_service.backends.interface import Row, Sampling


def test_rows_that_are_made_together():
    rows = [Row(0, None, steps=steps) for steps in (None, 5, 10, None, 5)]
    steps = [clip_rows.steps_of(row, Sampling(10, "ddim")) for row in rows]
    assert clip_rows.together(steps) == {10: [0, 2, 3], 5: [1, 4]}
