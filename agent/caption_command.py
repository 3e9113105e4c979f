"""`onthefly caption`: its arguments, as settings of the process that does it, which has the models."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from agent.recipes import settings_arguments

FLAGS = {
    "dataset": ("generator.dataset.root", "folder of the pictures"),
    "split": ("generator.dataset.split", "sub-folder of the dataset"),
    "model": ("agent.captioner.model", "a transformers folder or hub id, such as Salesforce/blip2-opt-2.7b"),
    "prompt": ("agent.captioner.prompt", 'that captions go on from, such as "a photo of"'),
}


def add(commands: Any) -> None:
    """The command's parser."""
    told = "Pictures that have a caption keep it, so that a run which was interrupted goes on where it was."
    command = commands.add_parser("caption", help="describe a dataset's pictures in its metadata.jsonl", epilog=told)
    settings_arguments(command)
    for flag, (setting, told) in FLAGS.items():
        command.add_argument(f"--{flag}", help=f"{told} ({setting})")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Turn into the process that captions, which then gets every signal itself."""
    given = {setting: getattr(options, flag) for flag, (setting, _) in FLAGS.items()}
    overrides = [*options.set, *(f"{name}={json.dumps(value)}" for name, value in given.items() if value is not None)]
    command = ["-m", "generator_service.language", *(["--config", str(options.config)] if options.config else [])]
    command += [part for override in overrides for part in ("--set", override)]
    os.execv(sys.executable, [sys.executable, *command])
