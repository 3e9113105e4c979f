"""One machine, whole: broker, generators and trainer, started from one settings file and kept alive."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path

from agent.follow import console, follow
from agent.live_tuning import LiveTuning
from agent.settings import AgentConfig
from agent.supervisor import Child, Supervisor, job_is_over, service_is_over
from protocol import config
from protocol.broker import URL_VARIABLE, open_broker
from protocol.bus import QueueConfig
from protocol.client import GeneratorClient
from protocol.errors import (
    ConfigError,
    NotReady,
    Retryable,
    ServiceUnreachable,
    UnknownJob,
)
from protocol.messages import AdaptJob
from protocol.policy import PolicyJob
from protocol.tuning import TuneJob

START_S = 1800.0  # for a generator to load its model, download included, and make a first image
BEGINNINGS = 3  # of an adaptation or a tuning before it is given up, each time because the generator died
HOST, PORT, SAMPLES_DIR = "127.0.0.1", 8000, "runs/generator/samples"  # the generator's own defaults


class Machine:
    """Broker and generators of a run, up and ready; trainers are started on it.

    Args:
        client: talks to the generators.
        arguments: the settings as the command line of every child.
    """

    def __init__(
        self, supervisor: Supervisor, client: GeneratorClient, arguments: list[str], environment: dict[str, str]
    ):
        self.client = client
        self._generators = list(supervisor.children)
        self._supervisor, self._arguments, self._environment = supervisor, arguments, environment

    def prepare(self, agent: AgentConfig) -> TuneJob | None:
        """What comes before a training: adapting, tuning what came of it, and learning a policy for what came of that,
        as far as the settings say so.

        Returns:
            What is to be tuned while it trains; None: nothing.

        Raises:
            as `follow`.
        """
        made = None if agent.adapt is None else self.adapt(agent.adapt)
        if agent.tune is not None:
            job = agent.tune if agent.tune.base else agent.tune.model_copy(update={"base": made})
            if agent.tune_while_training:
                return job
            made = self.tune(job)
        if agent.policy is not None:
            self.learn_policy(agent.policy if agent.policy.base else agent.policy.model_copy(update={"base": made}))
        return None

    def adapt(self, job: AdaptJob) -> str:
        """Adapt a generator and wait for it; begin again when it dies meanwhile.

        Returns:
            The weights that result, "name@version".

        Raises:
            as `follow`.
        """
        return self._persist("adaptation", partial(adapt, self.client, job))

    def tune(self, job: TuneJob) -> str:
        """Tune a generator by reward, which goes on from its checkpoint when it is begun again; else as `adapt`."""
        return self._persist("tuning", partial(tune, self.client, job))

    def learn_policy(self, job: PolicyJob) -> str:
        """Learn which sampling suits which clip; begun again as `tune`, else as `adapt`."""
        return self._persist("learning of the policy", partial(learn_policy, self.client, job))

    def _persist(self, what: str, do: Callable[[], str]) -> str:
        left = BEGINNINGS
        while True:
            try:
                return do()
            except (ServiceUnreachable, NotReady, UnknownJob) as error:
                left -= 1
                if not left or self.gone():
                    raise
                console.print(f"the {what} is begun again: {error}")
                self.client.wait_ready(START_S)

    def gone(self) -> bool:
        """Whether all its generators have ended for good."""
        return all(generator.ended for generator in self._generators)

    def train(self, *extra: str, fresh: bool = False, log: Path | None = None) -> Child:
        """Start a trainer with these arguments added.

        Args:
            fresh: set an earlier run aside first: once, not at every new start of the trainer.
            log: file that gets what it says; None: the terminal does.

        Raises:
            ConfigError: it could not be set aside.
        """
        arguments = [*self._arguments, *extra]
        if fresh:
            _trainer("--set-aside", *arguments)
        trainer = self._supervisor.start("trainer", "trainer", arguments, self._environment, log)
        trainer.keep(job_is_over)
        return trainer


@contextmanager
def machine(path: Path | None, overrides: Sequence[str]) -> Iterator[Machine]:
    """Start broker and generators and wait until images can be made; everything is stopped at the end.

    Raises:
        ConfigError: the settings are wrong. ServiceUnreachable: a generator did not come up; its log says why.
    """
    settings = config.load(path, overrides)
    config.check_tables(settings, config.TABLES)
    agent = config.section(settings, "agent", AgentConfig)  # fail before anything is started
    broker = config.section(settings, "broker", QueueConfig)
    table = settings.get("generator", {})
    overrides = [*_same_images(settings), *overrides]
    host, ports = _addresses(table, agent.replicas)
    urls = [f"http://{host}:{port}" for port in ports]
    overrides = [*overrides, f"trainer.service.url={json.dumps(urls)}"]
    with open_broker(broker) as broker_url, Supervisor() as supervisor:
        # every process has its share of the cores; spinning threads would fight
        threads = str(max(1, (os.cpu_count() or 2) // (agent.replicas + 1)))
        key = table.get("api_key") or os.environ.get("ONTHEFLY_API_KEY")
        environment = {URL_VARIABLE: broker_url, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}
        for index, port in enumerate(ports):
            own = _arguments(path, [*overrides, f"generator.port={port}", *_own_folder(table, index)])
            name = f"generator {index + 1}" if len(ports) > 1 else "generator"
            supervisor.start(name, "generator_service", own, environment)
        if key:
            environment["ONTHEFLY_API_KEY"] = key
        for generator, url in zip(supervisor.children, urls, strict=True):
            with GeneratorClient(url, api_key=key) as client:
                _wait_ready(client, generator)
            generator.keep(service_is_over)
        admin = table.get("admin_key") or os.environ.get("ONTHEFLY_ADMIN_KEY") or key  # adapts and activates
        with GeneratorClient(urls, api_key=admin) as client:
            yield Machine(supervisor, client, _arguments(path, overrides), environment)


def _same_images(settings: config.Settings) -> list[str]:
    """The generator mounts the trainer's dataset, unless its own table names one."""
    own, of_trainer = settings.get("generator", {}), settings.get("trainer", {}).get("dataset", {})
    if "dataset" in own:
        return []
    return [f"generator.dataset.{key}={json.dumps(value)}" for key, value in of_trainer.items()]


def _arguments(path: Path | None, overrides: Sequence[str]) -> list[str]:
    """The settings as a child's command line."""
    arguments = ["--config", str(path)] if path else []
    return arguments + [part for override in overrides for part in ("--set", override)]


def _addresses(table: dict, replicas: int) -> tuple[str, list[int]]:
    """Where the generators listen: consecutive ports, or free ones for port 0."""
    host, port = table.get("host", HOST), table.get("port", PORT)
    if port:
        return host, [port + index for index in range(replicas)]
    with ExitStack() as probes:  # all open at a time, so that no port comes twice
        try:
            opened = [probes.enter_context(socket.create_server((host, 0))) for _ in range(replicas)]
        except OSError as error:
            raise ConfigError(f"cannot listen on generator.host = {host!r}: {error}", param="generator.host") from error
        return host, [probe.getsockname()[1] for probe in opened]


def _own_folder(table: dict, index: int) -> list[str]:
    """Each replica has its samples_dir: the first one the setting's, the others one beside it."""
    folder = f"{table.get('samples_dir', SAMPLES_DIR)}-{index + 1}"
    return [f"generator.samples_dir={json.dumps(folder)}"] if index else []


def _wait_ready(client: GeneratorClient, generator: Child) -> None:
    with console.status("the generator is loading its model"):
        for _ in range(int(START_S)):
            if not generator.running:
                raise ServiceUnreachable(f"the {generator.name} stopped while it was starting: its log above says why")
            try:
                client.wait_ready(timeout_s=1.0)
                return
            except Retryable:
                continue
    raise ServiceUnreachable(f"the {generator.name} was not ready within {START_S:.0f} s: its log above says why")


def adapt(client: GeneratorClient, job: AdaptJob) -> str:
    """Adapt the generator and wait for it; at once when the service did this very job before.

    Returns:
        The weights that result, "name@version".

    Raises:
        as `follow`.
    """
    return _made(client, job, "adapted")


def tune(client: GeneratorClient, job: TuneJob) -> str:
    """Tune the generator by reward; else as `adapt`."""
    return _made(client, job, "tuned")


def learn_policy(client: GeneratorClient, job: PolicyJob) -> str:
    """Learn a sampling policy by reward; else as `adapt`."""
    return _made(client, job, "learnt a policy")


def _made(client: GeneratorClient, job: AdaptJob | TuneJob | PolicyJob, done: str) -> str:
    made = follow(client, job).result
    assert made is not None
    weights = f"{made['name']}@{made['version']}"
    console.print(f"{done}: weights {weights}")
    return weights


def check(path: Path, overrides: Sequence[str]) -> config.Settings:
    """The settings, when they are right: seen to before minutes are spent on starting and adapting.

    Raises:
        ConfigError: a table is wrong, or there is none for the trainer.
    """
    settings = config.load(path, overrides)
    if "trainer" not in settings:
        raise ConfigError(f"{path} has no table [trainer]: say at least trainer.dataset.root in it")
    config.section(settings, "agent", AgentConfig)
    _trainer("--check", *_arguments(path, overrides))
    return settings


def _trainer(*arguments: str) -> None:
    """Have the trainer do what is done at once. Raises ConfigError with what it says when it fails."""
    done = subprocess.run([sys.executable, "-m", "trainer", *arguments], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise ConfigError(done.stderr.strip().removeprefix("error: "))
    sys.stderr.write(done.stderr)


def up(path: Path, overrides: Sequence[str], *, fresh: bool) -> int:
    """Run one training on this machine; returns the trainer's exit status."""
    agent = config.section(check(path, overrides), "agent", AgentConfig)
    with machine(path, overrides) as running:
        beside = running.prepare(agent)
        trainer = running.train(fresh=fresh)
        with LiveTuning(running.client, beside, running.gone, console.print) if beside else nullcontext():
            return trainer.wait()
