"""`onthefly faces`: its arguments, as settings of the process that reads faces, which has the models."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from agent.recipes import settings_arguments


def add(commands: Any) -> None:
    """The command's parser."""
    told = "Clips that were looked at before are not looked at again, so an interrupted run goes on where it was."
    command = commands.add_parser("faces", help="neutral frames and action units of a run's clips", epilog=told)
    settings_arguments(command, required=True)
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Turn into the process that reads faces, which then gets every signal itself."""
    command = ["-m", "generator_service.faces", "--config", str(options.config)]
    command += [part for override in options.set for part in ("--set", override)]
    os.execv(sys.executable, [sys.executable, *command])
