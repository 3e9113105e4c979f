"""Messages from the arguments of a command line. Knows no command."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

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
