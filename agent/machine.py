"""One machine, whole: broker, generator and trainer, started from one settings file."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from agent.settings import AgentConfig
from agent.supervisor import Child, Supervisor
from protocol import config
from protocol.broker import URL_VARIABLE, open_broker
from protocol.bus import QueueConfig
from protocol.client import GeneratorClient
from protocol.errors import ConfigError, GenerationFailed, Retryable, ServiceUnreachable, from_problem
from protocol.messages import AdaptJob, Job, JobRequest

START_S = 120.0  # for the generator to load its model and make a first image
console = Console(stderr=True)


class Machine:
    """Broker and generator of a run, up and ready; trainers are started on it.

    Args:
        client: talks to the generator.
        arguments: the settings as the command line of every child.
    """

    def __init__(
        self, supervisor: Supervisor, client: GeneratorClient, arguments: list[str], environment: dict[str, str]
    ):
        self.client = client
        self._supervisor, self._arguments, self._environment = supervisor, arguments, environment

    def train(self, *extra: str) -> Child:
        """Start a trainer with these arguments added."""
        return self._supervisor.start("trainer", "trainer", [*self._arguments, *extra], self._environment)


@contextmanager
def machine(path: Path | None, overrides: Sequence[str]) -> Iterator[Machine]:
    """Start broker and generator and wait until an image can be made; everything is stopped at the end.

    Raises:
        ConfigError: the settings are wrong. ServiceUnreachable: the generator did not come up; its log says why.
    """
    settings = config.load(path, overrides)
    config.check_tables(settings, config.TABLES)
    config.section(settings, "agent", AgentConfig)  # fail before anything is started
    broker = config.section(settings, "broker", QueueConfig)
    host, port = _address(settings.get("generator", {}))
    url = f"http://{host}:{port}"
    arguments = _arguments(path, [*overrides, f"generator.port={port}", f'trainer.service.url="{url}"'])
    with open_broker(broker) as broker_url, Supervisor() as supervisor:
        threads = str(max(1, (os.cpu_count() or 2) // 2))  # two processes share the cores; spinning threads would fight
        key = settings.get("generator", {}).get("api_key") or os.environ.get("ONTHEFLY_API_KEY")
        environment = {URL_VARIABLE: broker_url, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}
        generator = supervisor.start("generator", "generator_service", arguments, environment)
        if key:
            environment["ONTHEFLY_API_KEY"] = key
        with GeneratorClient(url, api_key=key) as client:
            _wait_ready(client, generator)
            yield Machine(supervisor, client, arguments, environment)


def _arguments(path: Path | None, overrides: Sequence[str]) -> list[str]:
    """The settings as a child's command line."""
    arguments = ["--config", str(path)] if path else []
    return arguments + [part for override in overrides for part in ("--set", override)]


def _address(table: dict) -> tuple[str, int]:
    """Where the generator listens; port 0 becomes a free one."""
    host, port = table.get("host", "127.0.0.1"), table.get("port", 8000)
    if port == 0:
        try:
            with socket.create_server((host, 0)) as probe:
                port = probe.getsockname()[1]
        except OSError as error:
            raise ConfigError(f"cannot listen on generator.host = {host!r}: {error}", param="generator.host") from error
    return host, port


def _wait_ready(client: GeneratorClient, generator: Child) -> None:
    with console.status("the generator is loading its model"):
        for _ in range(int(START_S)):
            if not generator.running:
                raise ServiceUnreachable("the generator stopped while it was starting: its log above says why")
            try:
                client.wait_ready(timeout_s=1.0)
                return
            except Retryable:
                continue
    raise ServiceUnreachable(f"the generator was not ready within {START_S:.0f} s: its log above says why")


def adapt(client: GeneratorClient, job: AdaptJob) -> None:
    """Adapt the generator and wait for it; at once when the service did this very job before. Raises as `follow`."""
    made = follow(client, job).result
    assert made is not None
    console.print(f"adapted: weights {made['name']}@{made['version']}")


def follow(client: GeneratorClient, request: JobRequest) -> Job:
    """Submit a job, show its progress, and return it when it has succeeded.

    Raises:
        the error that the job failed with.
    """
    job = client.submit(request)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(job.type, total=None)
        try:
            for event in client.events(job.id):
                if event.kind == "progress":
                    loss = event.data.get("loss")
                    text = job.type if loss is None else f"{job.type}, loss {loss:.4f}"
                    bar.update(task, description=text, completed=event.data["step"], total=event.data["steps"])
        except KeyboardInterrupt:
            client.cancel(job.id)
            raise
    job = client.job(job.id)
    if job.status != "succeeded":
        raise from_problem(job.problem) if job.problem else GenerationFailed(f"job {job.id} ended as {job.status}")
    return job


def up(path: Path, overrides: Sequence[str], *, fresh: bool) -> int:
    """Run one training on this machine; returns the trainer's exit status."""
    settings = config.load(path, overrides)
    if "trainer" not in settings:
        raise ConfigError(f"{path} has no table [trainer]: say at least trainer.dataset.root in it")
    agent = config.section(settings, "agent", AgentConfig)
    check = [sys.executable, "-m", "trainer", "--check", *_arguments(path, overrides)]
    if status := subprocess.run(check).returncode:  # before minutes are spent on starting and adapting
        return status
    with machine(path, overrides) as running:
        if agent.adapt is not None:
            adapt(running.client, agent.adapt)
        return running.train(*(["--fresh"] if fresh else [])).wait()
