"""`onthefly adapt`: its arguments, and the job that they say."""

from __future__ import annotations

import argparse
from typing import Any

from agent.arguments import checked
from agent.recipes import settings_arguments
from agent.settings import AgentConfig
from protocol import config
from protocol.errors import InvalidRequest
from protocol.messages import AdaptJob, LoraOptions

TABLE = "agent.adapt"


def add(commands: Any) -> argparse.ArgumentParser:
    """The command's parser; who adds it says how it is run."""
    told = f"With --config instead of a name: what its table [{TABLE}] says, unless that was done before."
    command = commands.add_parser("adapt", help="fine-tune a running service on its dataset", epilog=told)
    command.add_argument("name", nargs="?", help="of the weight set that results")
    settings_arguments(command)
    command.add_argument("--base", help="weights to start from (default: the service's checkpoint)")
    for field, kind in (("steps", int), ("batch-size", int), ("learning-rate", float), ("seed", int)):
        default = AdaptJob.model_fields[field.replace("-", "_")].default
        command.add_argument(f"--{field}", type=kind, help=f"(default: {default})")
    command.add_argument("--method", help="cold_start, for class-conditional models; lora, for those that read text")
    told = f"of method lora; repeatable: {', '.join(LoraOptions.model_fields)}"
    command.add_argument("--lora", action="append", metavar="OPTION=VALUE", help=told)
    command.add_argument("--activate", action="store_true", help="serve with the result when it is ready")
    return command


def job(options: argparse.Namespace) -> AdaptJob | None:
    """From the arguments, or from the settings; None when those have none."""
    names = ("name", "base", "steps", "batch_size", "learning_rate", "seed", "method")
    given = {name: getattr(options, name) for name in names}
    lora = config.load(None, [f"lora.{option}" for option in options.lora]).get("lora") if options.lora else None
    given |= {"activate": options.activate or None, "lora": lora}
    if options.config is None:
        if options.name is None or options.set:
            raise InvalidRequest(f"say the NAME of the weights that result, or --config FILE with a table [{TABLE}]")
        return checked(AdaptJob, **given, again=True)
    if unused := [name for name, value in given.items() if value is not None]:
        raise InvalidRequest(f"with --config, write --set {TABLE}.{unused[0]}=... instead", param=unused[0])
    settings = config.load(options.config, options.set)
    config.check_tables(settings, config.TABLES)
    return config.section(settings, "agent", AgentConfig).adapt
