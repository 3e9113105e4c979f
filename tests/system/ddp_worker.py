"""One process of a run that several train: as `python -m trainer`, which also keeps what lookahead chose.

torchrun --nproc-per-node N -m tests.system.ddp_worker CONFIG RECORD
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from protocol import config as settings_file
from protocol.bus import QueueConfig
from trainer import loop
from trainer.parallel import joined
from trainer.run import Run
from trainer.settings import TrainerConfig
from trainer.start import open_run


@dataclass
class Record:
    """What one process saw of a run, update by update."""

    chosen: list[list[bool]] = field(default_factory=list)  # of the rows of the whole batch
    losses: list[float] = field(default_factory=list)  # summed over those
    trained: list[int] = field(default_factory=list)  # rows that this process trained on


def train(config: TrainerConfig, broker: str) -> Record:
    """Train a run, together with the other processes if there are any."""
    record = Record()
    select = loop.select

    def recorded(*arguments) -> torch.Tensor:
        chosen = select(*arguments)
        record.chosen.append(chosen.tolist())
        return chosen

    def after_update(run: Run) -> None:
        chosen = record.chosen[-1]
        so_far = sum(record.losses[len(record.losses) + 1 - run.at.done :]) if run.at.done > 1 else 0.0
        record.losses.append(run.at.sums["real_loss"] + run.at.sums["synthetic_loss"] - so_far)
        record.trained.append(sum(chosen[run.processes.part(len(chosen))]))

    with (
        pytest.MonkeyPatch.context() as patch,
        joined(config.device) as processes,
        open_run(config, QueueConfig(url=broker), processes=processes) as (run, source),
    ):
        patch.setattr(loop, "select", recorded)
        loop.train(run, source, after_update)
    return record


if __name__ == "__main__":
    settings = settings_file.load(Path(sys.argv[1]))
    seen = train(settings_file.section(settings, "trainer", TrainerConfig), os.environ["ONTHEFLY_BROKER_URL"])
    torch.save(vars(seen), f"{sys.argv[2]}.{os.environ['RANK']}")
