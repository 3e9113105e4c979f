"""`onthefly demo`: handwritten digits, real data only against on the fly, side by side."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from rich.table import Table

from agent import machine
from agent.settings import AgentConfig
from protocol import config
from protocol.errors import GenerationFailed

PER_CLASS = 5  # real training images of each digit
BASELINE, OURS = "real-only", "on-the-fly"
ROWS = (
    ("top-1 accuracy (held out)", "test_top1", "{:.3f}"),
    ("worst class / best class", "worst_case_disparity", "{:.3f}"),
    ("optimiser updates", "updates", "{:d}"),
    ("wall time, s", "wall_s", "{:.1f}"),
    ("trainer idle (waiting)", "trainer_idle", "{:.0%}"),
    ("generator idle", "generator_idle", "{:.0%}"),
    ("synthetic samples generated", "generated", "{:d}"),
    ("  dropped by VoG", "vog_dropped", "{:d}"),
    ("  dropped as stale", "stale", "{:d}"),
    ("synthetic rows seen by lookahead", "lookahead_seen", "{:d}"),
    ("  kept by lookahead", "lookahead_kept", "{:d}"),
)


def demo(out: Path, seed: int) -> int:
    """Cold start, a run on real data only, an asynchronous run on the fly; then a table and a report.

    Args:
        out: folder of the demo; `report.html` is written in it.
    """
    every = arms()
    status = _train(out, seed, {name: every[name] for name in (BASELINE, OURS)})
    if status != 0:
        return status
    report = out / "report.html"
    _report(out / OURS, out / BASELINE, report)
    machine.console.print(_table({name: _summary(out / name) for name in (BASELINE, OURS)}))
    machine.console.print(f"the pictures are in {report}")
    return 0


def study(out: Path, seeds: int) -> int:
    """Every arm over several seeds, each with images, initial weights and noise of its own; mean and standard error."""
    every = arms()
    accuracy: dict[str, list[float]] = {name: [] for name in every}
    for seed in range(seeds):
        folder = out / f"seed-{seed}"
        status = _train(folder, seed, every)
        if status != 0:
            return status
        for name, values in accuracy.items():
            values.append(_summary(folder / name)["test_top1"])
    table = Table(title=f"top-1 accuracy, mean over {seeds} seeds; same model, same number of updates")
    for column in ("", "mean", "standard error", f"minus {BASELINE}", "standard error", "each seed"):
        table.add_column(column, justify="left" if not column else "right")
    for name, values in accuracy.items():
        gain = [value - base for value, base in zip(values, accuracy[BASELINE], strict=True)]
        numbers = (statistics.mean(values), _error(values), statistics.mean(gain), _error(gain))
        each = " ".join(f"{value:.3f}" for value in values)
        table.add_row(name, *(f"{number:.4f}" for number in numbers), each)
    machine.console.print(table)
    return 0


def _error(values: list[float]) -> float:
    """Standard error of the mean."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def arms() -> dict[str, list[str]]:
    """Name of an arm -> what it changes in the recipe's [trainer]."""
    with as_file(files("agent.recipes") / "digits.toml") as recipe:
        settings = config.load(recipe)
    trainer, agent = settings["trainer"], settings["agent"]
    stage_2 = trainer["iterations"] - trainer["warmup_iterations"]
    equal_count = math.ceil(stage_2 * trainer["feedback"]["fraction"] * agent["images_per_sample"])
    no_vog, no_lookahead = "trainer.vog.enabled=false", "trainer.lookahead.enabled=false"
    static = ["trainer.mode=offline", "trainer.pool_match=all", f"trainer.feedback.images_per_sample={equal_count}"]
    return {
        BASELINE: ["trainer.mode=real"],
        "static": [*static, no_vog, no_lookahead],  # as many samples in all, made once, for every real image alike
        OURS: [],
        "no-vog": [no_vog],
        "no-lookahead": [no_lookahead],
    }


def _train(out: Path, seed: int, chosen: dict[str, list[str]]) -> int:
    """Adapt the generator to `seed`'s images, then train every arm on them. The first exit status that is not 0."""
    from agent.digits import write_digits  # scikit-learn is the demo's alone

    data = out / f"data-{PER_CLASS}-{seed}"
    write_digits(data, per_class=PER_CLASS, seed=seed)
    overrides = [
        f'generator.dataset.root="{data}"',
        'generator.dataset.split="train"',
        f'generator.weights_dir="{out / f"weights-{seed}"}"',  # each seed's own: another seed holds these images out
        f'generator.samples_dir="{out / f"samples-{seed}"}"',
        f'trainer.dataset.root="{data}"',
        'trainer.dataset.split="train"',
        f'trainer.runs_dir="{out}"',
        f"trainer.seed={seed}",
    ]
    with as_file(files("agent.recipes") / "digits.toml") as recipe, machine.machine(recipe, overrides) as running:
        agent = config.section(config.load(recipe), "agent", AgentConfig)
        assert agent.adapt is not None
        machine.console.rule("adapting the generator: from letters to digits")
        running.adapt(agent.adapt)
        for name, changes in chosen.items():
            machine.console.rule(f"training: {name}")
            settings = (f'trainer.run="{name}"', *changes)
            arguments = [part for setting in settings for part in ("--set", setting)]
            status = running.train(*arguments, fresh=True).wait()
            if status != 0:
                return status
    return 0


def _summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def _report(run: Path, baseline: Path, out: Path) -> None:
    command = [sys.executable, "-m", "trainer.report", str(run), "--baseline", str(baseline), "--out", str(out)]
    if subprocess.run(command).returncode != 0:
        raise GenerationFailed(f"the report of {run} could not be made; the message above says why")


def _table(runs: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="same model, same number of updates")
    table.add_column("")
    for name in runs:
        table.add_column(name, justify="right")
    for label, key, form in ROWS:
        values = [summary.get(key) for summary in runs.values()]
        table.add_row(label, *("-" if value is None else form.format(value) for value in values))
    return table
