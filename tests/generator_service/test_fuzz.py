"""A short run of `make fuzz`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.generator_service.fuzz import fuzz


@pytest.mark.slow
def test_requests_that_nobody_thought_of(tmp_path: Path):
    done = fuzz(tmp_path, examples=6, seed=1, phases="fuzzing")
    assert done.returncode == 0, done.stdout + done.stderr
    counted = re.search(r"(\d+) generated, (\d+) passed", done.stdout)
    assert counted and counted[1] == counted[2] and int(counted[1]) >= 100, done.stdout
