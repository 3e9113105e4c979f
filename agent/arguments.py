"""Messages from the arguments of a command line. Knows no command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from agent.settings import AgentConfig
from protocol import config
from protocol.errors import InvalidRequest

Body = TypeVar("Body", bound=BaseModel)


def checked(message: type[Body], **fields: Any) -> Body:
    """A message; fields that are None are left out. Raises InvalidRequest naming what is wrong."""
    try:
        return message.model_validate({name: value for name, value in fields.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))  # of the whole message: nowhere
        told = f"{where}: {first['msg']} (it is {first['input']!r})" if where else first["msg"]
        raise InvalidRequest(told) from error


def learning_job(options: argparse.Namespace, kind: type[Body], name: str, fields: Sequence[str]) -> Body | None:
    """A job that the generator learns by, from the arguments, with `--set rollout.identities=8` and the like; or from
    the settings, None when those have none.

    Args:
        name: of the command, and of its table in [agent]. fields: of the job, that are arguments.

    Raises InvalidRequest, and ConfigError as `config.load`.
    """
    table = f"agent.{name}"
    given = {field: getattr(options, field) for field in fields}
    given |= {field: getattr(options, field) or None for field in ("again", "activate")}
    given = {field: value for field, value in given.items() if value is not None}
    if options.config is not None:
        if given:
            field = next(iter(given))
            raise InvalidRequest(f"with --config, write --set {table}.{field}=... instead", param=field)
        settings = config.load(options.config, options.set)
        config.check_tables(settings, config.TABLES)
        return getattr(config.section(settings, "agent", AgentConfig), name)
    if options.name is None:
        raise InvalidRequest(f"say the NAME of the weights that result, or --config FILE with a table [{table}]")
    # an override wants a table: a plain field of the job is one as well
    set_here = config.load(None, [f"{name}.{override}" for override in options.set]).get(name, {})
    return checked(kind, **{**set_here, **given})
