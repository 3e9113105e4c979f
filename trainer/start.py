"""Puts one run together from its settings, and trains it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from protocol import config as settings_file
from protocol import logs, tracing
from protocol.broker import EMBEDDED
from protocol.bus import Bus, QueueConfig
from protocol.client import GeneratorClient
from protocol.dataset import Dataset
from protocol.errors import ConfigError
from trainer import adaptation, folder, publish, ready_made, registry, resume, summary, telemetry
from trainer.board import Reporter
from trainer.data.splits import Splits, open_splits
from trainer.feed import Feed
from trainer.journal import Journal, Unwritten
from trainer.loop import train
from trainer.parallel import OneProcess, joined, several
from trainer.pool import Candidate, Pool, packed, unpacked
from trainer.progress import Progress
from trainer.run import Run
from trainer.settings import TrainerConfig
from trainer.shortages import check_some
from trainer.source import (
    LiveSource,
    OfflinePool,
    PoolMembers,
    RealOnly,
    RealSamples,
    Shared,
    Source,
    make_pool,
    stand_ins,
)
from trainer.tasks.interface import Task
from trainer.video_quality.assessment import opened

# settings that may differ between them
MACHINE = {"runs_dir", "device", "threads", "cache_gib", "workers", "service", "metrics_host", "metrics_port"}


def start(config: TrainerConfig, broker: QueueConfig, *, fresh: bool = False) -> None:
    """Train a run from its beginning, or from its last checkpoint when its folder holds one; under torchrun, together
    with the other processes.

    Args:
        fresh: set the folder of an earlier run aside (it is renamed, not deleted) and start anew.

    Raises:
        ConfigError, DatasetError, CheckpointCorrupt, TrainingDiverged, BrokerUnavailable, ...: see protocol.errors.
        PeerFailed: another process raised it.
    """
    with joined(config.device) as processes:
        if fresh:
            processes.first(lambda: folder.set_aside(config.folder))
        with open_run(config, broker, processes=processes) as (run, source), ExitStack() as stack:
            if processes.is_first:
                train(run, source, after_update=stack.enter_context(Progress(run)).update)
            else:
                train(run, source)
        processes.first(lambda: summary.write(config.folder), pack=lambda _: None)


@contextmanager
def open_run(
    config: TrainerConfig,
    broker: QueueConfig,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    processes: OneProcess | None = None,
    preprocess: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[tuple[Run, Source]]:
    """A run, restored to its last checkpoint if it has one, and its source of samples. Arguments as in `Run`.

    Args:
        processes: those that train it, this one among them; None: it is alone.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if processes is None and several():
        raise ConfigError(
            "OnTheFly makes the updates of one process: start it without torchrun, or train with torchrun -m trainer"
        )
    processes = processes or OneProcess(config.device)
    tracing.setup("trainer")
    with ExitStack() as stack:
        stack.enter_context(logs.fields(run=config.run))
        with processes.together():
            task, splits = _data(config)
            pool, journal = _records(config, splits.dataset, stack) if processes.is_first else (None, Unwritten())
            run = Run(config, task, splits, pool, journal, processes, model, optimizer, preprocess)
        _check_same(run)
        resumed, source, members = resume.restore(run), None, []
        with processes.together():
            if processes.is_first:
                settings_file.write_resolved({"trainer": config, "broker": broker}, config.folder / "settings.toml")
                if resumed:
                    journal.event("resumed", f"going on at iteration {run.at.iteration}, update {run.at.updates}")
                source, members = _source(config, broker, run, resumed, stack)
                if config.metrics_port:
                    stack.enter_context(telemetry.served(run))
                if config.publish.name is not None:
                    run.after_iteration.append(stack.enter_context(publish.opened(run)))
        if config.mode == "synthetic":
            run.stand_in(processes.first(lambda: members, pack=packed, unpack=unpacked))
        yield run, Shared(processes, source)


def _records(config: TrainerConfig, dataset: Dataset, stack: ExitStack) -> tuple[Pool, Journal]:
    """The run's folder, held until the stack is left."""
    stack.enter_context(folder.held(config.folder))
    if config.pool_from is not None:
        ready_made.take_over(config, dataset.digest())
    journal = Journal(config.folder)
    stack.callback(journal.close)
    return Pool(config.folder / "batches"), journal


def _check_same(run: Run) -> None:
    """Raises ConfigError when a process has other settings or data than the first one; another machine's may differ."""
    own = run.config.model_dump(mode="json", exclude=MACHINE) | {"dataset": run.splits.dataset.digest()}
    first = run.processes.first(lambda: own)
    with run.processes.together():
        for name, value in own.items():
            if value != first[name]:
                raise ConfigError(
                    f"a process of the run has another trainer.{name}: {value!r}; the first one has {first[name]!r}. "
                    "Give every machine the same settings and data",
                    param=name,
                )


def _source(
    config: TrainerConfig, broker: QueueConfig, run: Run, resumed: bool, stack: ExitStack
) -> tuple[Source, list[Candidate]]:
    """Where the samples come from, open until the stack is left, and those that stand in for the real ones, if any."""
    dataset = run.splits.dataset
    if config.mode == "real":
        return RealOnly(), []
    if config.mode == "offline" and config.pool_from is not None:
        return OfflinePool(config, dataset, run.pool), []  # nobody is asked
    check_some(config, dataset)
    feed = stack.enter_context(_feed(config, broker, run, resumed))
    stack.enter_context(Reporter(run, Bus(_shared_url(broker), broker, patient=False)))
    if config.mode == "offline":
        make_pool(config, dataset, feed)
        return OfflinePool(config, dataset, run.pool), []
    if config.mode == "synthetic":
        members, copies = stand_ins(config, dataset, feed)
        run.at.add(candidates=len(copies), near_copies=len(copies))
        return LiveSource(config, PoolMembers(members, dataset), feed), members
    return LiveSource(config, RealSamples(dataset, config.feedback.send_pixels), feed), []


def check(config: TrainerConfig) -> None:
    """See whether the task can be had, and what it is measured on is named rightly, before anything is read.

    Raises:
        ConfigError: the task or its table [trainer.model] is wrong, or a network of [trainer.measure.video] is missing.
    """
    _task(config, config.dataset.classes or ())
    opened(config.measure.video, torch.device("cpu"))


def _task(config: TrainerConfig, classes: Sequence[str]) -> Task:
    kind = registry.resolve("task", config.task)
    return kind(settings_file.section({"trainer.model": config.model}, "trainer.model", kind.Config), classes)


def _data(config: TrainerConfig) -> tuple[Task, Splits]:
    """The task, and the images to train and to test on."""
    dataset = Dataset.open(config.dataset)
    task = _task(config, dataset.classes)
    return task, open_splits(config, dataset, task)


@contextmanager
def _feed(config: TrainerConfig, broker: QueueConfig, run: Run, resumed: bool) -> Iterator[Feed]:
    """The running feed between this run, the service and the queue."""
    with ExitStack() as stack:
        bus = Bus(_shared_url(broker), broker)
        stack.callback(bus.close)
        key = config.service.api_key or os.environ.get("ONTHEFLY_API_KEY")
        client = stack.enter_context(
            GeneratorClient(
                config.service.url, api_key=key, timeout=config.service.timeout_s, retries=0
            )  # the feed's part
        )
        if not resumed:
            bus.forget_run(config.run)
        feed = Feed(config.service, client, bus, run.pool, run.journal, config.run, config.staleness, config.folder)
        if resumed:
            feed.resume(run.at.iteration)
        yield stack.enter_context(feed)
        adaptation.note(client, [batch.weights for batch in run.pool.batches() if batch.samples], config.folder)


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
