"""Logs of a process: rich on a terminal, JSON lines otherwise.

Knows nothing of what is logged; anything that looks like a credential in a URL is masked all the same.
"""

from __future__ import annotations

import json
import logging
import sys

from rich.console import Console
from rich.logging import RichHandler

from protocol.config import mask

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, process, logger, message, what `extra` added, and the traceback."""

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
        entry |= {key: mask(value) for key, value in vars(record).items() if key not in _STANDARD}
        if record.exc_info:
            entry["traceback"] = mask(self.formatException(record.exc_info))
        return json.dumps(entry, default=str)


def setup(process: str, level: int = logging.INFO) -> None:
    """Send this process's logs to stderr. `process` names it in every JSON line."""
    if sys.stderr.isatty():
        handler: logging.Handler = RichHandler(console=Console(stderr=True), show_path=False)
        handler.setFormatter(logging.Formatter("%(message)s", datefmt="%X"))
        handler.addFilter(_masked)
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(JsonLines(process))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for every request otherwise


def _masked(record: logging.LogRecord) -> bool:
    record.msg, record.args = mask(record.getMessage()), ()
    return True
