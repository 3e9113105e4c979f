"""Logs of a process: rich on a terminal, JSON lines otherwise.

Knows nothing of what is logged; anything that looks like a credential in a URL is masked all the same. Two loggers are
named for what they tell, a line each time: "access" of every HTTP request, "units" of every step of a work unit. They
are for machines to read, and left out on a terminal.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from rich.console import Console
from rich.logging import RichHandler

from protocol.config import mask

ROUTINE = ("access", "units")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}
_fields: ContextVar[Mapping[str, Any]] = ContextVar("fields", default={})  # noqa: B039  # never changed in place


@contextmanager
def fields(**named: Any) -> Iterator[None]:
    """Add fields to every line that is logged within the block, in this thread or task; None adds none."""
    before = _fields.get()
    _fields.set({**before, **{name: value for name, value in named.items() if value is not None}})
    try:
        yield
    finally:
        _fields.set(before)


def current() -> Mapping[str, Any]:
    """The fields that lines logged here get."""
    return _fields.get()


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, process, logger, message, the `fields` around it, what `extra` added, and
    the traceback."""

    def __init__(self, process: str):
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": record.created,
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": mask(record.getMessage()),
        }
        extra = {key: value for key, value in vars(record).items() if key not in _STANDARD}
        entry |= {key: mask(value) for key, value in {**current(), **extra}.items()}
        if record.exc_info:
            entry["traceback"] = mask(self.formatException(record.exc_info))
        return json.dumps(entry, default=str)


def setup(process: str, level: int = logging.INFO) -> None:
    """Send this process's logs to stderr. `process` names it in every JSON line."""
    if sys.stderr.isatty():
        handler: logging.Handler = RichHandler(console=Console(stderr=True), show_path=False)
        handler.setFormatter(logging.Formatter("%(message)s", datefmt="%X"))
        handler.addFilter(_masked)
        for name in ROUTINE:
            logging.getLogger(name).setLevel(logging.WARNING)
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(JsonLines(process))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for every request otherwise


def _masked(record: logging.LogRecord) -> bool:
    record.msg, record.args = mask(record.getMessage()), ()
    return True
