from __future__ import annotations

import json
import subprocess
import sys

SCRIPT = """
import logging
from protocol import logs
logs.setup("trainer")
log = logging.getLogger("a.b")
log.info("connected to %s", "redis://:hush@host:1/0", extra={"unit": 3, "url": "redis://u:hush@host"})
try:
    raise ValueError("redis://:hush@host is bad")
except ValueError:
    log.exception("failed")
log.debug("not shown")
"""


def test_away_from_a_terminal_logs_are_json_lines_without_credentials():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    first, second = (json.loads(line) for line in done.stderr.splitlines())
    assert (first["level"], first["process"], first["logger"]) == ("info", "trainer", "a.b")
    assert (first["message"], first["unit"]) == ("connected to redis://***@host:1/0", 3)
    assert "ValueError" in second["traceback"] and second["level"] == "error"
    assert "hush" not in done.stderr and done.stdout == ""
