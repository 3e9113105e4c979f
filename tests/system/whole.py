"""A whole system small enough for tests: real broker, real HTTP, the real DiT with random weights, the real trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from generator_service.service import Service
from protocol.bus import QueueConfig
from tests.generator_service.tiny_service import make_service, served, started
from trainer.loop import train
from trainer.run import Run
from trainer.settings import TrainerConfig
from trainer.start import open_run


@contextmanager
def serving(folder: Path, broker: str, checkpoint: Path, data: Path, **settings: Any) -> Iterator[str]:
    """The URL of a service that takes work from the broker."""
    with serving_both(folder, broker, checkpoint, data, **settings) as (_, url):
        yield url


@contextmanager
def serving_both(
    folder: Path, broker: str, checkpoint: Path, data: Path, at_port: int = 0, **settings: Any
) -> Iterator[tuple[Service, str]]:
    settings = {"dit": {"checkpoint": str(checkpoint), "device": "cpu"}, "dataset": {"root": data}} | settings
    service = make_service(folder, broker, threads=1, **settings)
    with started(service), served(service, at_port) as url:
        yield service, url


def trainer_config(folder: Path, data: Path, url: str, **settings: Any) -> TrainerConfig:
    """Five iterations of two epochs, the first two on real data only."""
    plain = {
        "runs_dir": folder,
        "device": "cpu",
        "threads": 1,
        "dataset": {"root": data},
        "test_split": "",
        "model": {"image_size": 8, "drop_rate": 0.2, "shift": 1},
        "mode": "sync",
        "iterations": 5,
        "warmup_iterations": 2,
        "epochs": 2,
        "batch_size": 5,
        "gradient_rows": 2,
        "optimizer": {"learning_rate": 0.05},
        "feedback": {"fraction": 0.4},
        "service": {"url": url, "answer_timeout_s": 60.0, "outage_grace_s": 0.2},
    }
    return TrainerConfig.model_validate(plain | settings)


def run_training(config: TrainerConfig, broker: str, after_update: Callable[[Run], None] = lambda run: None) -> Run:
    """What `trainer.start.start` does, with a hook after every update."""
    with open_run(config, QueueConfig(url=broker)) as (run, source):
        train(run, source, after_update)
    return run
