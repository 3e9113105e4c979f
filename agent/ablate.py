"""`onthefly ablate`: the arms of GenDataAgent's ablations over several seeds, and the tables they make up."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from agent import machine, recipes
from agent.ablation import grid, show
from agent.ablation.results import Outcome, Result, outcome, table_result
from agent.ablation.runs import Bench, train
from agent.recipes import RecipeConfig
from protocol import config
from protocol.errors import ConfigError


def add_command(commands: Any) -> None:
    command = commands.add_parser("ablate", help="the paper's ablations: arms x seeds, one table with all of them")
    recipes.settings_arguments(command, required=True)
    every = ",".join(grid.TABLES)
    command.add_argument("--tables", default=every, help="which, with commas between them (default: %(default)s)")
    command.add_argument("--seeds", type=int, default=5, help="how many, from 0 on (default: %(default)s)")
    command.add_argument("--out", type=Path, default=Path("runs/ablation"), help="folder (default: %(default)s)")
    command.add_argument("--list", action="store_true", help="only show the arms of the tables")
    command.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    tables = grid.chosen(name.strip() for name in options.tables.split(","))
    if options.list:
        return show_arms(config.load(options.config, options.set), tables)
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
    """Train what is not done of these tables, seed by seed; print them, and write `ablation.md` and `ablation.json`.

    Returns:
        0 when every arm of every seed is done, else 1.

    Raises:
        ConfigError: the recipe is wrong, or nothing can be compared with it.
    """
    benches = {seed: Bench.of(path, overrides, out / f"seed-{seed}", seed) for seed in seeds}
    settings = machine.check(path, [*benches[seeds[0]].own, *overrides])
    if settings["trainer"].get("test_split") == "":
        raise ConfigError(
            "an ablation compares accuracies on held-out images: set trainer.test_split", param="test_split"
        )
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
        (out / "ablation.md").write_text(show.markdown(result))
    console = Console()
    for part in show.terminal(result):
        console.print(part)
    return 1 if failed else 0


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
    return Result(
        recipe=settings.source,
        dataset=dataset,
        seeds=list(benches),
        effort=_effort(settings["trainer"]),
        tables={name: table_result(name, table, run_as, outcomes, failed, dataset) for name, table in tables.items()},
    )


def _effort(trainer: Mapping[str, Any]) -> str:
    """What the arms have in common: updates where the recipe fixes those, else epochs, as in the paper."""
    if steps := trainer.get("steps_per_iteration"):
        return f"{steps} updates an iteration in every arm"
    return "as many epochs in every arm, over all its data"
