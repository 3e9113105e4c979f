from __future__ import annotations

import json
import os
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


FIELDS = """
import logging, threading
from protocol import logs
logs.setup("generator")
log = logging.getLogger("units")
with logs.fields(run="r", unit=None, url="redis://u:hush@host"):
    with logs.fields(unit="r.1.0", run="other"):
        log.info("claimed", extra={"unit": "mine"})
    log.info("outer")
    thread = threading.Thread(target=log.info, args=("elsewhere",))
    thread.start()
    thread.join()
log.info("after")
"""


def test_lines_carry_the_fields_around_them():
    done = subprocess.run([sys.executable, "-c", FIELDS], capture_output=True, text=True, check=True)
    inner, outer, elsewhere, after = (json.loads(line) for line in done.stderr.splitlines())
    assert (inner["run"], inner["unit"], inner["url"]) == ("other", "mine", "redis://***@host")
    assert outer["run"] == "r" and "unit" not in outer
    assert "run" not in elsewhere and "run" not in after


ROUTINE = """
import logging
from protocol import logs
logs.setup("generator")
for name in (*logs.ROUTINE, "generator_service"):
    logging.getLogger(name).info("told by " + name)
    logging.getLogger(name).error("trouble in " + name)
"""


def test_a_terminal_is_spared_the_routine_but_not_its_failures():
    near, far = os.openpty()
    subprocess.run([sys.executable, "-c", ROUTINE], stderr=far, check=True)
    os.close(far)
    shown = os.read(near, 10_000).decode()
    os.close(near)
    assert "told by generator_service" in shown and "told by access" not in shown and "told by units" not in shown
    assert "trouble in access" in shown and "trouble in units" in shown
