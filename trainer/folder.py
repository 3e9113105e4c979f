"""A run's folder: one trainer at a time, for one dataset and one set of settings. Knows nothing of what is in it."""

from __future__ import annotations

import fcntl
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from protocol.errors import ConfigError
from trainer.durable import remove_partial, write_durably

log = logging.getLogger("trainer")

MADE_FOR = "made_for.json"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other trainers out of the folder while the block runs; a trainer that dies lets go of it. What it was
    writing then is removed.

    Raises:
        ConfigError: another trainer has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"another trainer is at work in {folder}: wait for it, or choose another trainer.run"
            ) from error
        remove_partial(folder)
        yield


def check_made_for(folder: Path, now: dict[str, Any]) -> None:
    """Note what a new folder is for, or see that an old one is for the same.

    Args:
        now: plain values by name.

    Raises:
        ConfigError: names the first value that differs.
    """
    path = folder / MADE_FOR
    if not path.exists():
        write_durably(path, json.dumps(now).encode())
        return
    before = json.loads(path.read_text())
    for name, value in json.loads(json.dumps(now)).items():
        if before.get(name) != value:
            raise ConfigError(
                f"{folder} holds a run with another {name}: {before.get(name)!r}, now {value!r}. Set it back to go on, "
                "choose another trainer.run, or start anew with --fresh",
                param=name,
            )


def set_aside(folder: Path) -> None:
    """Rename a run's folder to the first free `{name}.1`, `{name}.2`, ...; does nothing when there is none.

    Raises:
        ConfigError: another trainer is at work in it.
    """
    if not folder.exists():
        return
    number = 1
    while (target := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    with held(folder):
        folder.rename(target)
    log.warning("the earlier run is kept in %s", target)
