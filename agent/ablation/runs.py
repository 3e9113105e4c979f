"""Trains arms, each in a folder of its own, on services that are shared by the arms with the same settings for them.

    {folder}/{run}/             the trainer's; its summary.json is there when it is done
    {folder}/{run}.settings     hash of all the settings that it was started with
    {folder}/{run}.log          what the trainer said

A run that is done with equal settings is not made again, one that was interrupted goes on. What an arm is for, and how
good it turned out, is not known here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent import machine, recipes
from agent.ablation.grid import overrides
from agent.ablation.table import Changes
from agent.recipes import RecipeConfig
from agent.settings import AgentConfig
from protocol import config
from protocol.errors import ConfigError, OnTheFlyError, PeerFailed

Failures = dict[str, str]  # run -> why it is not done
OWN = ("trainer.seed", "trainer.runs_dir", "trainer.run", "generator.weights_dir", "generator.samples_dir")


@dataclass(frozen=True)
class Bench:
    """Where the runs of one seed are made.

    Args:
        path: the recipe. said: the user's overrides. own: the overrides that say where things lie; other places are
            no reason to make a run again.
        folder: of the runs.
    """

    path: Path
    said: Sequence[str]
    own: Sequence[str]
    folder: Path

    @classmethod
    def of(cls, path: Path, said: Sequence[str], folder: Path, seed: int) -> Bench:
        """The bench of a seed. Images that the recipe draws are the seed's own, and so is what is adapted to them.

        Raises:
            ConfigError: the recipe is wrong, or the user sets what is set here.
        """
        if taken := [key for key in (text.partition("=")[0].strip() for text in said) if key in OWN]:
            raise ConfigError(f"an ablation sets {taken[0]} itself: leave it out of --set", param=taken[0])
        drawn = recipes.draw(config.section(config.load(path, said), "recipe", RecipeConfig), folder, seed)
        service = folder / f"service-{seed}" if drawn else folder.parent / "service"
        own = [
            "generator.port=0",
            f"generator.weights_dir={json.dumps(str(service / 'weights'))}",
            f"generator.samples_dir={json.dumps(str(service / 'samples'))}",
            f"trainer.runs_dir={json.dumps(str(folder))}",
            f"trainer.seed={seed}",
            *drawn,
        ]
        return cls(path, said, own, folder)

    def settings(self, changes: Changes) -> config.Settings:
        return config.load(self.path, self.said).overridden(overrides(changes))

    def digest(self, changes: Changes) -> str:
        return hashlib.sha256(json.dumps(self.settings(changes), sort_keys=True).encode()).hexdigest()

    def begun(self, run: str, changes: Changes) -> bool:
        """Whether it was started, with these very settings."""
        file = self.folder / f"{run}.settings"
        return file.is_file() and file.read_text() == self.digest(changes)

    def note_begun(self, run: str, changes: Changes) -> None:
        (self.folder / f"{run}.settings").write_text(self.digest(changes))

    def summary(self, run: str) -> dict[str, Any] | None:
        """Of a run that is done."""
        file = self.folder / run / "summary.json"
        return json.loads(file.read_bytes()) if file.is_file() else None

    def done(self, run: str, changes: Changes) -> bool:
        summary = self.summary(run) if self.begun(run, changes) else None
        return summary is not None and summary["iterations"] == summary["iterations_planned"]


def train(bench: Bench, arms: Mapping[str, Changes], *, again: bool = False, logged: bool = True) -> Failures:
    """Train the runs that are not done; one that fails does not keep the others from it.

    Args:
        arms: run -> what it changes in the recipe.
        again: set earlier runs aside and make all anew.
        logged: what trainers say goes to their logs; else to the terminal.
    """
    bench.folder.mkdir(parents=True, exist_ok=True)
    left = {run: changes for run, changes in arms.items() if again or not bench.done(run, changes)}
    failed: Failures = {}
    for group in _by_service(bench, left):
        failed |= _train_group(bench, group, again, logged)
    return failed


def _by_service(bench: Bench, arms: Mapping[str, Changes]) -> Iterator[dict[str, Changes]]:
    """The arms in groups, one for each service that they need."""
    groups: list[tuple[dict[str, Any], dict[str, Changes]]] = []
    for run, changes in arms.items():
        service = {table: value for table, value in bench.settings(changes).items() if table != "trainer"}
        members = next((members for known, members in groups if known == service), None)
        if members is None:
            groups.append((service, members := {}))
        members[run] = changes
    return (members for _, members in groups)


def _train_group(bench: Bench, group: Mapping[str, Changes], again: bool, logged: bool) -> Failures:
    """Start the service that these arms share, and train them on it, one after the other."""
    shared = next(iter(group.values()))
    of_service = overrides({key: value for key, value in shared.items() if not key.startswith("trainer.")})
    left, failed = list(group), {}
    try:
        agent = config.section(bench.settings(shared), "agent", AgentConfig)
        with machine.machine(bench.path, [*bench.own, *bench.said, *of_service]) as running:
            running.prepare(agent)
            while left:
                try:
                    _train_one(bench, running, left[0], group[left[0]], again, logged)
                except OnTheFlyError as error:
                    machine.console.print(f"{left[0]} failed: {error}")
                    failed[left[0]] = str(error)
                del left[0]
    except OnTheFlyError as error:
        machine.console.print(f"{', '.join(left)} failed: {error}")
        failed |= dict.fromkeys(left, str(error))
    return failed


def _train_one(bench: Bench, running: machine.Machine, run: str, changes: Changes, again: bool, logged: bool) -> None:
    """Raises PeerFailed with what the trainer said last, when it did not come to its end."""
    own = [f"trainer.run={run}", *(text for text in overrides(changes) if text.startswith("trainer."))]
    arguments = [part for text in own for part in ("--set", text)]
    log = bench.folder / f"{run}.log" if logged else None
    machine.console.print(f"training: {run}")
    earlier = (bench.folder / run).exists() and (again or not bench.begun(run, changes))
    trainer = running.train(*arguments, fresh=earlier, log=log)
    bench.note_begun(run, changes)
    if status := trainer.wait():
        told = f"{_last_words(log)} ({log} has more)" if log else "the messages above say why"
        raise PeerFailed(f"the trainer of {run} ended with status {status}: {told}")


def _last_words(log: Path) -> str:
    """The error that a trainer ended with: its last lines that are no log entries."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip() and line[0] != "{"]
    errors = [index for index, line in enumerate(lines) if line.startswith("error: ")]
    words = " ".join(line.strip() for line in lines[errors[-1] if errors else -1 :])
    return words.removeprefix("error: ") or "it did not say why"
