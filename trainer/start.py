"""Puts one run together from its settings, and trains it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from protocol import config as settings_file
from protocol.broker import EMBEDDED
from protocol.bus import Bus, QueueConfig
from protocol.client import GeneratorClient
from protocol.dataset import Dataset
from protocol.errors import ConfigError, DatasetError
from trainer import folder, registry, summary
from trainer.data.images import RealImages
from trainer.feed import Feed
from trainer.journal import Journal
from trainer.loop import train
from trainer.pool import Pool
from trainer.progress import Progress
from trainer.run import Run
from trainer.settings import TrainerConfig
from trainer.source import LiveSource, OfflinePool, RealOnly, Source
from trainer.summary import Summary
from trainer.tasks.interface import Task

log = logging.getLogger("trainer")


def start(config: TrainerConfig, broker: QueueConfig, *, fresh: bool = False) -> Summary:
    """Train a run from its beginning, or from its last checkpoint when its folder holds one.

    Args:
        fresh: set the folder of an earlier run aside (it is renamed, not deleted) and start anew.

    Raises:
        ConfigError, DatasetError, CheckpointCorrupt, TrainingDiverged, BrokerUnavailable, ...: see protocol.errors.
    """
    if fresh:
        folder.set_aside(config.folder)
    with open_run(config, broker) as (run, source), Progress(run) as progress:
        train(run, source, after_update=progress.update)
    return summary.write(config.folder)


@contextmanager
def open_run(
    config: TrainerConfig,
    broker: QueueConfig,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Iterator[tuple[Run, Source]]:
    """A run, restored to its last checkpoint if it has one, and its source of samples. Arguments as in `Run`."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("one process trains a run: start it without torchrun")
    with ExitStack() as stack:
        task, real, test = _data(config)
        stack.enter_context(folder.held(config.folder))
        journal = Journal(config.folder)
        stack.callback(journal.close)
        run = Run(config, task, real, test, Pool(config.folder / "batches"), journal, model, optimizer)
        resumed = run.restore()
        settings_file.write_resolved({"trainer": config, "broker": broker}, config.folder / "settings.toml")
        if resumed:
            journal.event("resumed", f"going on at iteration {run.at.iteration}, update {run.at.updates}")
        if config.mode == "real":
            yield run, RealOnly()
            return
        feed = stack.enter_context(_feed(config, broker, run, resumed))
        kind = OfflinePool if config.mode == "offline" else LiveSource
        yield run, kind(config, real.dataset, feed)


def _data(config: TrainerConfig) -> tuple[Task, RealImages, RealImages | None]:
    """The task, and the real images to train and to test on."""
    dataset = Dataset.open(config.dataset)
    kind = registry.resolve("task", config.task)
    task = kind(settings_file.section({"trainer.model": config.model}, "trainer.model", kind.Config), dataset.classes)
    size = task.config.image_size
    real = RealImages(dataset, size, config.cache_gib)
    if not config.test_split:
        return task, real, None
    labels = {"split": config.test_split, "classes": list(dataset.classes)}  # the same label means the same class
    try:
        held_out = Dataset.open(config.dataset.model_copy(update=labels))
    except DatasetError as error:
        raise DatasetError(
            f'{error.message} (trainer.test_split = "{config.test_split}"; set it to "" when nothing is held out)'
        ) from error
    return task, real, RealImages(held_out, size, config.cache_gib)


@contextmanager
def _feed(config: TrainerConfig, broker: QueueConfig, run: Run, resumed: bool) -> Iterator[Feed]:
    """The running feed between this run, the service and the queue."""
    with ExitStack() as stack:
        bus = Bus(_shared_url(broker), broker)
        stack.callback(bus.close)
        key = config.service.api_key or os.environ.get("ONTHEFLY_API_KEY")
        client = stack.enter_context(GeneratorClient(config.service.url, api_key=key, timeout=config.service.timeout_s))
        if not resumed:
            bus.forget_run(config.run)
        feed = Feed(config.service, client, bus, run.pool, run.journal, config.run, config.staleness, config.folder)
        if resumed:
            feed.resume(run.at.iteration)
        yield stack.enter_context(feed)


def _shared_url(broker: QueueConfig) -> str:
    """URL of the broker that trainer and service share; one of the trainer's own would be of no use."""
    url = broker.resolved_url()
    if url == EMBEDDED:
        raise ConfigError(
            "a trainer needs the broker that its generator service uses: set broker.url (or ONTHEFLY_BROKER_URL) on "
            "both, or let `onthefly up` start everything on this machine",
            param="broker.url",
        )
    return url
