"""Live progress of a run: a bar on a terminal, a log line an iteration otherwise."""

from __future__ import annotations

import logging
import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from trainer.record import Row
from trainer.run import Run
from trainer.summary import headline_of

log = logging.getLogger("trainer")


class Progress:
    """Follows one run. `update` is meant for the loop's `after_update`."""

    def __init__(self, run: Run):
        self._journal, self._run_name = run.journal, run.config.run
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
        self._journal.listeners.append(self._hear)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._journal.listeners.remove(self._hear)
        self._bar.stop()

    def _hear(self, name: str, row: Row) -> None:
        """A line of the journal: at the end of an iteration, how good the model is."""
        headline = headline_of(row) if name == "metrics.jsonl" else None
        if headline is not None:
            log.info("%s: iteration %d: %s %.4f", self._run_name, row["iteration"] + 1, headline, row[headline])

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
