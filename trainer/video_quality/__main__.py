"""Frechet video distances of synthetic clips from real ones, and how much they differ from each other.

    python -m trainer.video_quality --made RUN --features torchscript:i3d_torchscript.pt
    python -m trainer.video_quality --made FOLDER --real FOLDER_OR_SETTINGS --features ... --diversity timm:...

The first compares the clips that a run trained on with its own real ones, the second any two sets of clips: class
folders, or metadata.jsonl with `label` and `subject`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from protocol import config
from protocol.errors import ConfigError, DatasetError, OnTheFlyError
from trainer.durable import write_durably
from trainer.parallel import device_of
from trainer.settings import VideoMeasureConfig
from trainer.video_quality.assessment import Assessment, assess
from trainer.video_quality.quality import Groups
from trainer.video_quality.subject import compared

NUMBERS = {"frames": int, "size": int, "batch_size": int, "pairs": int}
NAMED = 5  # groups that were left out


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0 done, 2 a folder, the data or an argument is wrong, 1 any other failure."""
    options = _parser().parse_args(arguments)
    try:
        given = {name: getattr(options, name) for name in VideoMeasureConfig.model_fields}
        asked = {name: value for name, value in given.items() if value is not None}
        settings = config.section({"options": asked}, "options", VideoMeasureConfig)
        if not settings.wanted:
            raise ConfigError("say what to measure with: --features, --diversity or both", param="features")
        made, real = compared(options.made, options.real, options.set)
        found = assess(settings, made, real, device_of(options.device))
        if options.out is not None:
            write_durably(options.out, found.model_dump_json(indent=2).encode())
    except OnTheFlyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError | DatasetError) else 1
    console = Console()
    console.print(table(found, len(made), len(real)))
    for note in notes(found):
        console.print(f"* {note}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trainer.video_quality", description=__doc__.partition("\n")[0])
    parser.add_argument("--made", type=Path, required=True, help="folder of a run, or of synthetic clips")
    parser.add_argument("--real", type=Path, help="folder of real clips, or a settings file (default: the run's own)")
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE", help="override a setting")
    for name in VideoMeasureConfig.model_fields:
        kind = NUMBERS.get(name, str)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=f"as in [trainer.measure.video] {name}")
    parser.add_argument("--device", default="auto", help='such as "cpu" or "cuda:1" (default: %(default)s)')
    parser.add_argument("--out", type=Path, help="JSON file to write as well")
    return parser


def table(found: Assessment, made: int, real: int) -> Table:
    """The numbers as the paper's tables print them: a mean, and the standard deviation over the groups."""
    title = f"{made} synthetic clips, {real} real ones of their classes"
    shown = Table("", "", "groups", title=title, title_justify="left", box=box.SIMPLE_HEAD, show_header=True)
    if found.quality is not None:
        shown.add_row("FVD", _number(found.quality.fvd), "")
        for name, groups in (("sFVD, by subject", found.quality.sfvd), ("tFVD, by class", found.quality.tfvd)):
            shown.add_row(name, _spread(groups), f"{len(groups.distances)}")
    if found.diversity is not None:
        shown.add_row("diversity", _number(found.diversity.mean, 3), f"{len(found.diversity.classes)}")
        for name, value in found.diversity.classes.items():
            shown.add_row(f"  {name}", _number(value, 3), "")
    return shown


def notes(found: Assessment) -> list[str]:
    """What was not measured."""
    told = []
    if found.quality is not None:
        if found.quality.fvd is None:
            told.append(f"FVD takes two clips on either side: {found.quality.generated} and {found.quality.real}")
        for name, groups in (("sFVD", found.quality.sfvd), ("tFVD", found.quality.tfvd)):
            told += [f"{name}: {groups.note}"] if groups.note else []
            told += _left_out(name, groups.left_out)
            told += [f"{name}: the group of {groups.unassigned} clips is not known"] if groups.unassigned else []
    if found.diversity is not None:
        told += _left_out("diversity", dict.fromkeys(found.diversity.left_out, "it has one clip"))
    return told


def _left_out(name: str, groups: Mapping[str, str]) -> list[str]:
    told = [f"{name} leaves out {group}: {why}" for group, why in islice(groups.items(), NAMED)]
    more = len(groups) - len(told)
    return [*told, f"{name} leaves out {more} more for such reasons: --out FILE tells all"] if more else told


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _spread(groups: Groups) -> str:
    around = "" if groups.deviation is None else f" ± {groups.deviation:.2f}"
    return f"{_number(groups.mean)}{around}"


if __name__ == "__main__":
    sys.exit(main())
