"""`onthefly ablate`: the arms of the papers' ablations over several seeds, and the tables they make up."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from agent import machine, recipes
from agent.ablation import bars, grid, show
from agent.ablation.results import TOP1, Outcome, Result, outcome, table_result
from agent.ablation.runs import Bench, train
from agent.recipes import RecipeConfig
from agent.settings import AgentConfig
from protocol import config
from protocol.errors import ConfigError


def add_command(commands: Any) -> None:
    command = commands.add_parser("ablate", help="the papers' ablations: arms x seeds, one table with all of them")
    recipes.settings_arguments(command, required=True)
    every = f"of {','.join(grid.TABLES)}; with commas between them (default: those that suit the recipe)"
    command.add_argument("--tables", help=every)
    command.add_argument("--seeds", type=int, default=5, help="how many, from 0 on (default: %(default)s)")
    command.add_argument("--out", type=Path, default=Path("runs/ablation"), help="folder (default: %(default)s)")
    command.add_argument("--list", action="store_true", help="only show the arms of the tables")
    command.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    recipe = config.load(options.config, options.set)
    named = None if options.tables is None else [name.strip() for name in options.tables.split(",")]
    tables = grid.chosen(named, recipe)
    if options.list:
        return show_arms(recipe, tables)
    if options.seeds < 1:
        raise ConfigError("--seeds must be 1 at least", param="seeds")
    return ablate(options.config, options.set, tables, range(options.seeds), options.out)


def show_arms(settings: config.Settings, tables: Mapping[str, grid.Table]) -> int:
    arms = grid.arms(settings)
    run_as = grid.same(settings, arms)
    for name, table in tables.items():
        print(f"{name}: {table.title}")
        for label, arm in table.rows:
            print(f"  {label:38} {run_as[arm]:20} {' '.join(grid.overrides(arms[arm]))}")
    return 0


def ablate(
    path: Path, overrides: Sequence[str], tables: Mapping[str, grid.Table], seeds: Sequence[int], out: Path
) -> int:
    """Train what is not done of these tables, seed by seed; print them, and write `ablation.md` with its pictures, and
    `ablation.json`.

    Returns:
        0 when every arm of every seed is done, else 1.

    Raises:
        ConfigError: the recipe is wrong, or nothing can be compared with it.
    """
    benches = {seed: Bench.of(path, overrides, out / f"seed-{seed}", seed) for seed in seeds}
    said = [*benches[seeds[0]].own, *overrides]
    _check(config.load(path, said), tables)
    settings = machine.check(path, said)
    arms = grid.arms(settings)
    run_as = grid.same(settings, arms)
    names = grid.arms_of(tables, run_as)
    failed: dict[tuple[str, int], str] = {}
    try:
        for seed, bench in benches.items():
            machine.console.rule(f"seed {seed}: {len(names)} arms")
            runs = {_run_name(name, seed): arms[name] for name in names}
            failures = train(bench, runs)
            failed |= {(name, seed): failures[run] for name, run in zip(names, runs, strict=True) if run in failures}
    finally:
        result = _result(settings, benches, tables, run_as, arms, failed)
        out.mkdir(parents=True, exist_ok=True)
        (out / "ablation.json").write_text(result.model_dump_json(indent=2))
        for name in result.tables.keys() & show.FIGURES.keys():
            (out / show.picture(name)).write_text(bars.svg(result.tables[name], result.headline))
        (out / "ablation.md").write_text(show.markdown(result))
    console = Console()
    for part in show.terminal(result):
        console.print(part)
    return 1 if failed else 0


def _check(settings: config.Settings, tables: Mapping[str, grid.Table]) -> None:
    """Raises ConfigError where arms would be measured on nothing, or change each other."""
    _check_measured(settings.get("trainer", {}), tables)
    agent = config.section(settings, "agent", AgentConfig)
    if agent.tune_while_training:
        raise ConfigError(
            "the arms of an ablation share weights, which must not change meanwhile: set "
            "agent.tune_while_training = false",
            param="tune_while_training",
        )
    if agent.tune and not (agent.tune.activate and agent.adapt and agent.adapt.activate):
        raise ConfigError(
            "the arms of an ablation share a service, which serves the weights that were activated last, be it for "
            "another arm: set activate = true in [agent.adapt] and in [agent.tune]",
            param="activate",
        )
    if agent.policy and not agent.policy.activate:
        raise ConfigError(
            "the arms of an ablation share a service, which serves the weights that were activated last, be it for "
            "another arm: set activate = true in [agent.policy]",
            param="activate",
        )


def _check_measured(trainer: Mapping[str, Any], tables: Mapping[str, grid.Table]) -> None:
    task, model = trainer.get("task", "classification"), trainer.get("model", {})
    measured = {
        "classification": ("trainer.test_split", trainer.get("test_split") != ""),
        "reid": ("trainer.model.query_split and gallery_split", "query_split" in model),
        "face": ("trainer.model.pairs", bool(model.get("pairs"))),
        "video": ("trainer.test_split", trainer.get("test_split") != ""),
    }
    key, known = measured.get(task, ("", True))
    if not known:
        raise ConfigError(f"an ablation compares what is measured on held-out images: set {key}", param=key)
    features = trainer.get("measure", {}).get("video", {}).get("features")
    if (unmeasured := [name for name, table in tables.items() if table.distances]) and not features:
        raise ConfigError(
            f"{', '.join(unmeasured)}: the paper prints Frechet distances there, and no network is named to measure "
            "them by: set trainer.measure.video.features, or leave them out of --tables",
            param="trainer.measure.video.features",
        )


def _run_name(arm: str, seed: int) -> str:
    """Ids and noise of samples follow from the name of their run: each seed needs its own."""
    return f"{arm}-{seed}"


def _result(
    settings: config.Settings,
    benches: Mapping[int, Bench],
    tables: Mapping[str, grid.Table],
    run_as: Mapping[str, str],
    arms: Mapping[str, grid.Changes],
    failed: Mapping[tuple[str, int], str],
) -> Result:
    outcomes: dict[tuple[str, int], Outcome] = {}
    for name in grid.arms_of(tables, run_as):
        for seed, bench in benches.items():
            run = _run_name(name, seed)
            if bench.done(run, arms[name]):
                outcomes[name, seed] = outcome(bench.summary(run))
    dataset = config.section(settings, "recipe", RecipeConfig).paper
    headlines = {one.headline for one in outcomes.values()}
    return Result(
        recipe=settings.source,
        dataset=dataset,
        headline=next(iter(headlines), TOP1),
        seeds=list(benches),
        effort=_effort(settings["trainer"]),
        tables={name: table_result(name, table, run_as, outcomes, failed, dataset) for name, table in tables.items()},
    )


def _effort(trainer: Mapping[str, Any]) -> str:
    """What the arms have in common: updates where the recipe fixes those, else epochs, as in the paper."""
    if steps := trainer.get("steps_per_iteration"):
        return f"{steps} updates an iteration in every arm"
    return "as many epochs in every arm, over all its data"
