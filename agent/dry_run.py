"""`onthefly up --dry-run`: what a run would do, in order, without doing it.

Settings are checked as before a run; models, data and the service are not touched. What a table does not say has the
default of the process that reads it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from agent import machine
from agent.settings import AgentConfig
from protocol import config
from protocol.bus import QueueConfig
from protocol.policy import PolicyJob


def dry_run(path: Path, overrides: Sequence[str]) -> int:
    """Print the plan; returns 0.

    Raises:
        ConfigError: a table is wrong.
    """
    settings = machine.check(path, overrides)
    config.check_tables(settings, config.TABLES)
    for number, (title, lines) in enumerate(plan(settings), start=1):
        print(f"{number}. {title}")
        for line in lines:
            print(f"     {line}")
    return 0


def plan(settings: config.Settings) -> Iterator[tuple[str, list[str]]]:
    """Each step of a run: its title, and what is set for it, as `--set` takes it."""
    agent = config.section(settings, "agent", AgentConfig)
    generator, trainer = dict(settings.get("generator", {})), dict(settings["trainer"])
    of_trainer, of_generator, faces = (
        trainer.pop("dataset"),
        generator.pop("dataset", None),
        generator.pop("faces", None),
    )
    broker = config.section(settings, "broker", QueueConfig)
    yield "start the broker", said("broker", broker.model_dump(mode="json", include={"url"}))
    many = f"{agent.replicas} generator{'s' if agent.replicas > 1 else ''}"
    yield f"start {many} with the backend {generator.get('backend', 'dit')}", said("generator", generator)
    yield "read the data", _data(of_trainer, of_generator)
    if faces is not None:
        reader = faces.get("reader", "landmarks")
        yield f"find neutral frames to begin with: faces are read by {reader}", _faces(reader, faces, agent.policy)
    for title, name, job in (("adapt", "adapt", agent.adapt), ("tune by reward", "tune", agent.tune)):
        if job is not None:
            later = " while it trains" if name == "tune" and agent.tune_while_training else ""
            yield f"{title} the generator{later}", _table(f"agent.{name}", job)
    if agent.policy is not None:
        yield _learning(agent.policy), _table("agent.policy", agent.policy)
    task, mode = trainer.get("task", "classification"), trainer.get("mode", "async")
    when = "before" if mode == "offline" else "while"
    if faces is not None:
        chosen = agent.expressions
        others = {"openai", "local"} - {chosen.composer}
        title = f"{when} training, make clips, with prompts from action units: {chosen.composer}"
        yield title, _table("agent.expressions", chosen, without=others)
    elif mode != "real":
        yield f"{when} training, write prompts: {agent.perturb}", said("agent", {"prompt": agent.prompt})
    measured = {name: trainer.pop(name) for name in ("test_split", "measure") if name in trainer}
    yield f"train for {task}, mode {mode}", said("trainer", trainer)
    yield "measure", _measured(task, {"test_split": "test"} | measured)
    yield f"keep it all in {Path(trainer.get('runs_dir', 'runs')) / trainer.get('run', 'run')}", []


def _learning(job: PolicyJob) -> str:
    """What a policy is learnt from."""
    if job.method == "random":
        return "make a policy that draws steps and guidance"
    space = job.actions
    first, second = ({pair[side] for pair in space.pairs} for side in (0, 1))
    shapes = len(first) * len(second) if space.factorised else len(space.pairs)
    told = f"{job.steps:,} updates of {job.batch_size} pairs of first frame and text, {job.candidates} clips a pair"
    drawn, each = f"; {job.pairs:,} pairs in all" if job.pairs else "", len(space.steps) * shapes
    most = f"; none is made twice, so {each} a pair at most" if job.cache else ""
    clips = f", {job.pairs * each:,} clips" if job.cache and job.pairs else ""
    return f"learn a policy that chooses steps and guidance: {told}{most}{drawn}{clips}"


def _faces(reader: str, faces: Mapping[str, Any], policy: PolicyJob | None) -> list[str]:
    lines, given = said("generator.faces", faces), faces.get("openface") or {}
    if reader == "openface" and policy is not None and policy.method != "random" and not given.get("binary"):
        lines.append("# where is OpenFace? a policy has it read what is made: say generator.faces.openface.binary")
    elif reader == "openface" and not given:
        lines.append("# where is OpenFace? say generator.faces.openface.binary, or generator.faces.openface.folder")
    return lines


def _measured(task: str, values: Mapping[str, Any]) -> list[str]:
    lines = said("trainer", values)
    if task == "video" and not values.get("measure", {}).get("video", {}).get("features"):
        lines.append("# no Frechet distances: trainer.measure.video.features names no network")
    return lines


def _data(of_trainer: Mapping[str, Any], of_generator: Mapping[str, Any] | None) -> list[str]:
    lines, root = said("trainer.dataset", of_trainer), Path(str(of_trainer.get("root", "")))
    lines += [] if root.is_dir() else [f"# {root} is not there yet"]
    return lines + (said("generator.dataset", of_generator) if of_generator else [])


def _table(name: str, table: BaseModel, without: Collection[str] = ()) -> list[str]:
    """A table that the agent knows, with its defaults."""
    return said(name, table.model_dump(mode="json", exclude={"type", *without}, exclude_none=True))


def said(table: str, values: Mapping[str, Any]) -> list[str]:
    """A line for each value of a table and of those in it."""
    lines = []
    for name, value in values.items():
        key = f"{table}.{name}"
        if isinstance(value, Mapping):
            lines += said(key, value)
        else:
            shown = str(value).lower() if isinstance(value, bool) else str(config.mask(value))
            lines.append(f"{key} = {config.MASK if config.is_secret(key) and value else shown}")
    return lines
