"""Puts one run together from its settings, and trains it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from protocol import config as settings_file
from protocol.broker import EMBEDDED
from protocol.bus import Bus, QueueConfig
from protocol.client import GeneratorClient
from protocol.dataset import Dataset
from protocol.errors import ConfigError
from trainer import registry, summary
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

log = logging.getLogger("trainer")


def start(config: TrainerConfig, broker: QueueConfig, *, fresh: bool = False) -> Summary:
    """Train a run from its beginning, or from its last checkpoint when its folder holds one.

    Args:
        fresh: set the folder of an earlier run aside (it is renamed, not deleted) and start anew.

    Raises:
        ConfigError, DatasetError, CheckpointCorrupt, TrainingDiverged, BrokerUnavailable, ...: see protocol.errors.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if fresh:
        set_aside(config.folder)
    with ExitStack() as stack:
        run = build(config, stack)
        resumed = run.restore()
        settings_file.write_resolved({"trainer": config, "broker": broker}, config.folder / "settings.toml")
        if resumed:
            run.journal.event("resumed", f"going on at iteration {run.at.iteration}, update {run.at.updates}")
        source = stack.enter_context(open_source(config, broker, run, resumed))
        progress = stack.enter_context(Progress(run))
        train(run, source, after_update=progress.update)
    return summary.write(config.folder)


def build(config: TrainerConfig, stack: ExitStack) -> Run:
    """Data, task, pool and journal of a run; nothing is trained or asked yet."""
    dataset = Dataset.open(config.dataset)
    task_class = registry.resolve("task", config.task)
    task = task_class(
        settings_file.section({"trainer.model": config.model}, "trainer.model", task_class.Config), dataset.classes
    )
    real = RealImages(dataset, task.config.image_size, config.cache_gib)
    test = None
    if config.test_split:
        held_out = Dataset.open(config.dataset.model_copy(update={"split": config.test_split}))
        test = RealImages(held_out, task.config.image_size, config.cache_gib)
    journal = Journal(config.folder)
    stack.callback(journal.close)
    return Run(config, task, real, test, Pool(config.folder / "batches"), journal)


@contextmanager
def open_source(config: TrainerConfig, broker: QueueConfig, run: Run, resumed: bool) -> Iterator[Source]:
    """The source of synthetic samples that the mode asks for, for as long as the block lasts."""
    if config.mode == "real":
        yield RealOnly()
        return
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
        stack.enter_context(feed)
        yield (
            OfflinePool(config, run.real.dataset, feed)
            if config.mode == "offline"
            else LiveSource(config, run.real.dataset, feed)
        )


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


def set_aside(folder: Path) -> None:
    """Rename a run's folder to the first free `{name}.1`, `{name}.2`, ...; does nothing when there is none."""
    if not folder.exists():
        return
    number = 1
    while (target := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(target)
    log.warning("the earlier run is kept in %s", target)
