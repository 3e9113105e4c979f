"""`onthefly policy`: its arguments, and the job that they say."""

from __future__ import annotations

import argparse
from typing import Any

from agent.arguments import checked
from agent.recipes import settings_arguments
from agent.settings import AgentConfig
from protocol import config
from protocol.errors import InvalidRequest
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
    """From the arguments, with `--set actions.steps=[5,10]` and the like; or from the settings, None when those have
    none.

    Raises InvalidRequest, and ConfigError as `config.load`.
    """
    names = ("name", "base", "steps", "batch_size", "candidates", "seed")
    given = {name: getattr(options, name) for name in names} | {
        name: getattr(options, name) or None for name in ("again", "activate")
    }
    given = {name: value for name, value in given.items() if value is not None}
    if options.config is not None:
        if given:
            field = next(iter(given))
            raise InvalidRequest(f"with --config, write --set {TABLE}.{field}=... instead", param=field)
        settings = config.load(options.config, options.set)
        config.check_tables(settings, config.TABLES)
        return config.section(settings, "agent", AgentConfig).policy
    if options.name is None:
        raise InvalidRequest(f"say the NAME of the weights that result, or --config FILE with a table [{TABLE}]")
    # an override wants a table: a plain field of the job is one as well
    set_here = config.load(None, [f"policy.{override}" for override in options.set]).get("policy", {})
    return checked(PolicyJob, **{**set_here, **given})
