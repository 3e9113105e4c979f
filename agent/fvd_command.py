"""`onthefly fvd`: how far synthetic clips are from real ones. It is `trainer.video_quality` that measures."""

from __future__ import annotations

import argparse
import subprocess
import sys
from typing import Any

MODULE = "trainer.video_quality"
TEXT = ("real", "features", "diversity", "diversity-weights", "frames", "size", "batch-size", "pairs", "device", "out")


def add(commands: Any) -> None:
    """The command's parser."""
    told = f"What else can be said, and what each means: python -m {MODULE} --help"
    command = commands.add_parser("fvd", help="Frechet video distances of synthetic clips from real ones", epilog=told)
    command.add_argument("--made", required=True, help="folder of a run, or of synthetic clips")
    command.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE", help="override a setting")
    for name in TEXT:
        command.add_argument(f"--{name}")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Returns the measuring's exit status."""
    command = ["--made", options.made, *(part for text in options.set for part in ("--set", text))]
    for name in TEXT:
        if (value := getattr(options, name.replace("-", "_"))) is not None:
            command += [f"--{name}", value]
    return subprocess.run([sys.executable, "-m", MODULE, *command]).returncode
