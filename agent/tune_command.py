"""`onthefly tune`: its arguments, and the job that they say."""

from __future__ import annotations

import argparse
from typing import Any

from agent.arguments import learning_job
from agent.recipes import settings_arguments
from protocol.tuning import TuneJob

TABLE = "agent.tune"


def add(commands: Any) -> argparse.ArgumentParser:
    """The command's parser; who adds it says how it is run."""
    told = (
        f"With --config instead of a name: what its table [{TABLE}] says, unless that was done before. A job that was "
        "interrupted goes on from its last checkpoint."
    )
    command = commands.add_parser("tune", help="tune a running service's generator by reward", epilog=told)
    command.add_argument("name", nargs="?", help="of the weight sets that result")
    settings_arguments(command)
    command.add_argument("--base", help="weights to start from (default: the active ones)")
    for field in ("steps", "seed", "publish-every"):
        default = TuneJob.model_fields[field.replace("-", "_")].default
        command.add_argument(f"--{field}", type=int, help=f"(default: {default})")
    command.add_argument("--features", help=f"(default: {TuneJob.model_fields['features'].default})")
    command.add_argument("--again", action="store_true", help="also when this very job was done before")
    command.add_argument("--activate", action="store_true", help="serve with each weight set that is published")
    return command


def job(options: argparse.Namespace) -> TuneJob | None:
    """See `learning_job`."""
    return learning_job(options, TuneJob, "tune", ("name", "base", "steps", "seed", "publish_every", "features"))
