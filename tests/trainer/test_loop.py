"""Single steps of the loop. What they make up is in tests/system."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from protocol.bus import QueueConfig
from protocol.dataset import DatasetConfig
from tests.trainer.run_folder import write_dataset
from trainer.loop import select
from trainer.settings import TrainerConfig
from trainer.start import open_run


@pytest.mark.parametrize(("rows", "real", "left"), [(1, 0, 1), (2, 0, 2), (3, 0, 2), (3, 1, 2), (4, 2, 3), (8, 0, 4)])
def test_lookahead_leaves_two_rows_for_batch_statistics(tmp_path: Path, rows: int, real: int, left: int):
    """The last batch of an epoch may be small, and of synthetic rows alone."""
    write_dataset(tmp_path / "data")
    plain = {"runs_dir": tmp_path, "dataset": DatasetConfig(root=tmp_path / "data", split="train"), "mode": "real"}
    plain |= {"device": "cpu", "threads": 1, "task": "face", "model": {"model": "small_cnn", "image_size": (8, 8)}}
    with open_run(TrainerConfig.model_validate(plain), QueueConfig()) as (run, _):
        x, y = torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(rows) % 2
        synthetic = torch.arange(rows) >= real
        run.model.train()
        chosen = select(run, x, y, synthetic, 0.1)
        assert int(chosen.sum()) == left and chosen[:real].all()
        if left > 1:
            assert torch.isfinite(run.task.losses(run.model(x[chosen]), y[chosen])).all()
