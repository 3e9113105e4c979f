"""One process of runs that several train, one after the other: as `python -m trainer`, which also keeps what lookahead
chose.

torchrun --nproc-per-node N -m tests.system.ddp_worker CONFIG ...
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
from trainer.parallel import OneProcess, joined
from trainer.run import Run
from trainer.settings import TrainerConfig
from trainer.start import open_run


@dataclass
class Record:
    """What one process saw of a run, update by update."""

    chosen: list[list[bool]] = field(default_factory=list)  # of the rows of the whole batch
    losses: list[float] = field(default_factory=list)  # summed over those
    trained: list[int] = field(default_factory=list)  # rows that this process trained on


def train(config: TrainerConfig, broker: str, processes: OneProcess) -> Record:
    """Train a run, with the processes that there are."""
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
        open_run(config, QueueConfig(url=broker), processes=processes) as (run, source),
    ):
        patch.setattr(loop, "select", recorded)
        loop.train(run, source, after_update)
    return record


if __name__ == "__main__":
    with joined("cpu") as together:
        for path in map(Path, sys.argv[1:]):
            print(f"training {path.stem}", flush=True)
            settings = settings_file.section(settings_file.load(path), "trainer", TrainerConfig)
            seen = train(settings, os.environ["ONTHEFLY_BROKER_URL"], together)
            torch.save(vars(seen), path.with_suffix("." + os.environ["RANK"]))
