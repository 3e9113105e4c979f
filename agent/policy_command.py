"""`onthefly policy`: its arguments, and the job that they say."""

from __future__ import annotations

import argparse
from typing import Any

from agent.arguments import learning_job
from agent.recipes import settings_arguments
from protocol.policy import PolicyJob

TABLE = "agent.policy"


def add(commands: Any) -> argparse.ArgumentParser:
    """The command's parser; who adds it says how it is run."""
    told = (
        f"With --config instead of a name: what its table [{TABLE}] says, unless that was done before. A job that was "
        "interrupted goes on from its last checkpoint."
    )
    command = commands.add_parser("policy", help="learn by reward how a running service samples clips", epilog=told)
    command.add_argument("name", nargs="?", help="of the weight set that results")
    settings_arguments(command)
    command.add_argument("--base", help="weights whose clips are judged (default: the active ones)")
    for field in ("steps", "batch-size", "candidates", "seed"):
        default = PolicyJob.model_fields[field.replace("-", "_")].default
        command.add_argument(f"--{field}", type=int, help=f"(default: {default})")
    command.add_argument("--again", action="store_true", help="also when this very job was done before")
    command.add_argument("--activate", action="store_true", help="serve with the result when it is ready")
    return command


def job(options: argparse.Namespace) -> PolicyJob | None:
    """See `learning_job`."""
    return learning_job(options, PolicyJob, "policy", ("name", "base", "steps", "batch_size", "candidates", "seed"))
