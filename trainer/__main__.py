"""`python -m trainer --config FILE`: parse the settings first, only then import torch.

`torchrun --nproc-per-node N -m trainer --config FILE` trains the run with N processes.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from protocol import config, logs, parent
from protocol.bus import QueueConfig
from protocol.errors import ConfigError, DatasetError, OnTheFlyError, PeerFailed, Retryable
from trainer import folder
from trainer.settings import TrainerConfig

log = logging.getLogger("trainer")


def main(arguments: list[str] | None = None) -> int:
    """Train; returns the exit status: 0 done, 1 the run failed, 2 settings or data are wrong, 70 crashed,
    75 it may go better if started again, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="python -m trainer", description="Train a model, on the fly.")
    parser.add_argument("--config", type=Path, help="settings file (TOML)")
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE", help="override a setting")
    parser.add_argument("--fresh", action="store_true", help="set an earlier run of this name aside and start anew")
    parser.add_argument("--set-aside", action="store_true", help="only set an earlier run of this name aside")
    parser.add_argument("--check", action="store_true", help="only see whether the settings are right")
    parser.add_argument("--exit-with-parent", action="store_true", help="stop when standard input closes")
    options = parser.parse_args(arguments)
    logs.setup("trainer")
    parent.interruptible()
    if options.exit_with_parent:
        parent.exit_with_parent()
    speaks = os.environ.get("LOCAL_RANK", "0") == "0"  # of what every process of this machine would say
    try:
        try:
            settings = config.load(options.config, options.set)
            config.check_tables(settings, config.TABLES)
            trainer_config = config.section(settings, "trainer", TrainerConfig)
            broker_config = config.section(settings, "broker", QueueConfig)
        except OnTheFlyError as error:
            return _failed(error, speaks)
        if options.check:
            from trainer.start import check

            check(trainer_config)
            return 0
        if options.set_aside:
            folder.set_aside(trainer_config.folder)
            return 0
        from trainer.start import start

        start(trainer_config, broker_config, fresh=options.fresh)
    except OnTheFlyError as error:
        return _failed(error, speaks=not isinstance(error, PeerFailed))
    except Exception:
        log.exception("the trainer crashed")
        return parent.CRASHED
    except KeyboardInterrupt:
        if speaks:
            print("interrupted: start the same command again to go on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def _failed(error: OnTheFlyError, speaks: bool) -> int:
    """The exit status of an error, which is told if this process speaks."""
    if speaks:
        print(f"error: {error}", file=sys.stderr)
    if isinstance(error, ConfigError | DatasetError):
        return 2
    return parent.TEMPORARY if isinstance(error, Retryable) else 1


if __name__ == "__main__":
    sys.exit(main())
