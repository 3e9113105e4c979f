"""What the trainer gets of a work unit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from generator_service.backends.interface import Row
from generator_service.batching import Generated
from generator_service.results import Recorder
from generator_service.samples import SampleStore
from generator_service.telemetry import Telemetry
from protocol.messages import WeightsRef
from tests.generator_service.test_queue_worker import work_row, work_unit


@pytest.mark.parametrize(
    ("blackens", "black", "kept"),
    [(True, [1], [0, 2]), (True, [0, 1, 2], []), (True, [], [0, 1, 2]), (False, [1], [0, 1, 2])],
)
def test_images_that_the_safety_checker_flagged_are_missing(tmp_path: Path, blackens, black, kept):
    images = np.arange(3 * 2 * 2 * 3, dtype=np.uint8).reshape(3, 2, 2, 3)  # the first pixel is nearly black
    images[black] = 0
    weights = WeightsRef(name="pets", version=1, digest="pets")
    asked = work_unit(0, weights, *(work_row(number) for number in range(3))).model_copy(update={"missing": ["before"]})
    recorder = Recorder(SampleStore(tmp_path, 10, 10**6), None, 0.0, Telemetry(), blackens)
    batch, sent = recorder.sample_batch(
        asked, Generated(images, [Row(seed=0, label=None)] * 3, 1.0, 2.0), "worker", 0.0
    )
    assert [sample.id for sample in batch.samples] == [asked.rows[row].sample_id for row in kept]
    assert batch.missing == ["before", *(row.sample_id for at, row in enumerate(asked.rows) if at not in kept)]
    np.testing.assert_array_equal(sent, images[kept])
