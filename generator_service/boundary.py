"""The process's one catch-all: where a job fails, the failure is recorded, and the worker goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from protocol import logs
from protocol.errors import GenerationFailed, OnTheFlyError

log = logging.getLogger(__name__)


def guard(
    action: Callable[[], None], fail: Callable[[OnTheFlyError], None], about: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Run a job. What it raises goes to `fail`; anything outside the error tree is logged with its traceback and
    becomes GenerationFailed. `about`: fields of its log lines."""
    with logs.fields(**about):
        try:
            action()
        except OnTheFlyError as error:
            fail(error)
        except Exception as error:
            log.exception("a job failed")
            fail(
                GenerationFailed(f"it failed with {type(error).__name__}: {error}; the service's log has the traceback")
            )
