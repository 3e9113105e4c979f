"""`onthefly demo`: handwritten digits, real data only against on the fly, side by side."""

from __future__ import annotations

import json
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
    from agent.digits import write_digits

    data = out / f"data-{PER_CLASS}-{seed}"
    write_digits(data, per_class=PER_CLASS, seed=seed)
    overrides = [
        f'generator.dataset.root="{data}"',
        'generator.dataset.split="train"',
        f'generator.weights_dir="{out / "weights"}"',
        f'generator.samples_dir="{out / "samples"}"',
        f'trainer.dataset.root="{data}"',
        'trainer.dataset.split="train"',
        f'trainer.runs_dir="{out}"',
        f"trainer.seed={seed}",
    ]
    with as_file(files("agent.recipes") / "digits.toml") as recipe, machine.machine(recipe, overrides) as running:
        agent = config.section(config.load(recipe), "agent", AgentConfig)
        assert agent.adapt is not None
        machine.console.rule("adapting the generator: from letters to digits")
        machine.adapt(running.client, agent.adapt)
        for name, arguments in ARMS.items():
            machine.console.rule(f"training: {name}")
            status = running.train("--fresh", "--set", f'trainer.run="{name}"', *arguments).wait()
            if status != 0:
                return status
    report = out / "report.html"
    _report(out / "on-the-fly", out / "real-only", report)
    machine.console.print(_table({name: _summary(out / name) for name in ARMS}))
    machine.console.print(f"the pictures are in {report}")
    return 0


ARMS = {"real-only": ("--set", 'trainer.mode="real"'), "on-the-fly": ()}


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
