"""`onthefly demo`: handwritten digits, real data only against on the fly, side by side."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.table import Table

from agent import machine, recipes
from agent.ablation.runs import Bench, train
from protocol.errors import GenerationFailed

BASELINE, OURS = "real-only", "on-the-fly"
ARMS = {BASELINE: {"trainer.mode": "real"}, OURS: {}}
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
    bench = Bench.of(recipes.find("digits"), [], out, seed)
    if train(bench, ARMS, again=True, logged=False):
        return 1
    report = out / "report.html"
    _report(out / OURS, out / BASELINE, report)
    machine.console.print(_table({name: bench.summary(name) for name in ARMS}))
    machine.console.print(f"the pictures are in {report}")
    return 0


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
