"""`python -m generator_service.faces --config FILE`: find the neutral frames and the action units of a run's clips.

The service finds them itself when it starts; here one sees what was found, and what was left out and why. Both keep it
in the same place.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from generator_service.faces.identities import ADVICE, Identities
from generator_service.faces.interface import FacesConfig
from generator_service.faces.statistics import FILE
from generator_service.settings import GeneratorConfig
from protocol import config, logs, parent
from protocol.dataset import Dataset, DatasetConfig
from protocol.errors import ConfigError, DatasetError, OnTheFlyError

PATTERNS = 3  # of each class that are shown


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 failed, or no frame can be used, 2 settings or data are wrong, 130 interrupted: start
    again to go on."""
    options = _parser().parse_args(arguments)
    logs.setup("faces")
    parent.interruptible()
    try:
        settings = config.load(options.config, options.set)
        config.check_tables(settings, config.TABLES)
        faces = config.section(settings, "generator", GeneratorConfig).faces
        if faces is None:
            raise ConfigError(
                'no table [generator.faces]: say how faces are read, such as reader = "landmarks" and, in '
                "[generator.faces.landmarks], its checkpoint",
                param="generator.faces",
            )
        found = _identities(DatasetConfig.of_service(settings), faces)
        _show(found, faces)
    except OnTheFlyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError | DatasetError) else 1
    except KeyboardInterrupt:
        print("interrupted: what was found is kept; start the same command again to go on", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m generator_service.faces", description="Find neutral frames.")
    parser.add_argument("--config", type=Path, help="settings file (TOML)")
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE", help="override a setting")
    return parser


def _identities(place: DatasetConfig, faces: FacesConfig) -> Identities:
    dataset = Dataset.open(place)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("clips", total=None)
        return Identities.open(
            dataset, faces, faces.folder, on_clip=lambda done, total: bar.update(task, completed=done, total=total)
        )


def _show(found: Identities, faces: FacesConfig) -> None:
    table = Table("class", "clips", "neutral frames", f"action units together (part of the clips, first {PATTERNS})")
    for name, clips in found.report.clips.items():
        told = [f"{' '.join(pattern['units'])} ({pattern['part']:.0%})" for pattern in found.patterns[name][:PATTERNS]]
        table.add_row(name, str(clips), str(found.report.usable[name]), "\n".join(told) or "none is frequent")
    Console().print(table)
    print(found.report)
    for reason in found.report.left_out:
        print(f"  {reason.replace('_', ' ')}: {ADVICE[reason]}")
    print(f"written to {faces.folder}, with {FILE}")


if __name__ == "__main__":
    sys.exit(main())
