"""A landmark model of one drawn person, trained once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from generator_service.faces.landmark_training import train_landmarks
from tests.generator_service.faces.drawn import SIZE, drawn


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("landmarks")
    images, points, units = drawn(160, 0)
    nobody = np.full((10, SIZE, SIZE, 3), 130, dtype=np.uint8)
    losses: list[float] = []
    train_landmarks(
        np.concatenate([images, nobody]),
        np.concatenate([points, np.full((10, 68, 2), np.nan)]),
        np.arange(170) < 160,
        folder,
        model="test_convnext",
        stage=1,
        size=SIZE,
        steps=150,
        batch_size=32,
        neutral=np.append(~units.any(axis=1), np.zeros(10, dtype=bool)),
        device="cpu",
        on_step=lambda step, loss: losses.append(loss),
    )
    assert len(losses) == 150 and np.isfinite(losses).all()  # where there is nobody, landmarks are NaN and not learnt
    return folder
