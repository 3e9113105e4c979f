"""Live progress of a run: a bar on a terminal, a log line an iteration otherwise."""

from __future__ import annotations

import logging
import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from trainer.run import Run

log = logging.getLogger("trainer")


class Progress:
    """Follows one run. `update` is meant for the loop's `after_update`."""

    def __init__(self, run: Run):
        self._shown = -1
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("updates of this iteration"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
        )
        self._task = self._bar.add_task(run.config.run, total=None)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def update(self, run: Run) -> None:
        """Called after every optimiser update."""
        iteration = run.at.iteration
        if iteration != self._shown:
            self._shown = iteration
            log.info(
                "%s: iteration %d of %d, %d real and %d synthetic samples",
                run.config.run,
                iteration + 1,
                run.config.iterations,
                len(run.real),
                len(run.synthetic),
            )
        self._bar.update(
            self._task,
            description=f"{run.config.run}: iteration {iteration + 1}/{run.config.iterations}",
            completed=run.at.done,
            total=run.steps(),
        )
