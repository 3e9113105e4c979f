"""`python -m generator_service.language --config FILE`: caption the dataset of [generator.dataset].

The model is that of [agent.captioner]; without one nothing is written, and prompts name the class alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from agent.settings import AgentConfig
from generator_service import registry
from generator_service.language.caption_dataset import Captioned, caption
from generator_service.settings import GeneratorConfig
from protocol import config, logs, parent
from protocol.dataset import Dataset, DatasetConfig
from protocol.errors import ConfigError, DatasetError, OnTheFlyError


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 failed, 2 settings or data are wrong, 130 interrupted: start again to go on."""
    options = _parser().parse_args(arguments)
    logs.setup("caption")
    parent.interruptible()
    try:
        settings = config.load(options.config, options.set)
        config.check_tables(settings, config.TABLES)
        place = config.section(settings, "generator", GeneratorConfig).dataset
        if place is None:
            raise ConfigError("no dataset: set generator.dataset, or give a folder with --dataset", param="dataset")
        table = config.section(settings, "agent", AgentConfig).captioner
        if not table:
            print("no captioner: set agent.captioner.model or --model; without captions, prompts name the class alone")
            return 0
        print(_caption(place, table))
    except OnTheFlyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError | DatasetError) else 1
    except KeyboardInterrupt:
        print("interrupted: what was done is written; start the same command again to go on", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m generator_service.language", description="Caption a dataset.")
    parser.add_argument("--config", type=Path, help="settings file (TOML)")
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE", help="override a setting")
    return parser


def _caption(place: DatasetConfig, table: dict[str, object]) -> Captioned:
    dataset = Dataset.open(place)
    kind, settings = registry.language("captioner")
    chosen = config.section({"agent.captioner": table}, "agent.captioner", settings)
    captioner = kind(chosen)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("captions", total=None)
        return caption(
            dataset,
            place,
            captioner.describe,
            chosen.batch_size,
            lambda done, total: bar.update(task, completed=done, total=total),
        )


if __name__ == "__main__":
    sys.exit(main())
