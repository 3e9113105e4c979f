"""Settings of a run: one TOML file, a table for each process, and overrides from the command line.

Knows nothing of what the tables mean: a component's pydantic `Config`, next to the class it configures, says that.
"""

from __future__ import annotations

import difflib
import re
import tomllib
import typing
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import BaseModel, ValidationError

from protocol.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)
MASK = "***"
SECRET = ("api_key", "admin_key", "password")  # ends of the keys whose values are never shown
TABLES = ("broker", "generator", "agent", "trainer", "recipe")  # of one file; each process reads its own


class Settings(dict[str, Any]):
    """The tables of one run, and where they were read, for messages."""

    def __init__(self, tables: Mapping[str, Any], source: str):
        super().__init__(tables)
        self.source = source

    def overridden(self, overrides: Sequence[str]) -> Settings:
        """A copy with `a.b=c` overrides laid over it. Raises as `load`."""
        copy = deepcopy(self)
        for override in overrides:
            _lay_over(copy, override)
        return copy


def load(path: Path | None, overrides: Sequence[str] = ()) -> Settings:
    """Read a settings file and lay `a.b=c` overrides over it.

    Args:
        path: a TOML file; None: overrides only. Above its tables it may say `include = "FILE"`, a path from its own
            folder: then it is laid over that file's tables, key by key.
        overrides: each `table.key=value`; the value is read as TOML, or else taken as a bare string.

    Raises:
        ConfigError: the file or what it includes is missing or not TOML, or an override has no key or no table.
    """
    settings = Settings({}, "the settings") if path is None else Settings(_read(path), str(path))
    return settings.overridden(overrides)


def _read(path: Path, including: tuple[Path, ...] = ()) -> dict[str, Any]:
    """`including`: the files that led here, each by its `include`."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the settings file {path} ({error.strerror}): check --config") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    included = tables.pop("include", None)
    if included is None:
        return tables
    if not isinstance(included, str) or path.resolve() in including:
        raise ConfigError(f"{path}: include must name one other file, which does not include this one", param="include")
    return _merged(_read(path.parent / included, (*including, path.resolve())), tables)


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid over `under`: what is a table in both is merged, anything else replaced."""
    both = {key for key in under.keys() & over.keys() if isinstance(under[key], dict) and isinstance(over[key], dict)}
    return {**under, **over, **{key: _merged(under[key], over[key]) for key in both}}


def _lay_over(settings: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if is_secret(key.strip()) or mask(text) != text:
        raise ConfigError(
            f"{key.strip()} is a secret, and other users of this machine see command lines: write it into the settings "
            "file, or into an environment variable (ONTHEFLY_API_KEY, ONTHEFLY_ADMIN_KEY, ONTHEFLY_BROKER_URL)",
            param=key.strip(),
        )
    *tables, last = key.strip().split(".")
    if not equals or not tables or not all((*tables, last)):
        raise ConfigError(f"override {override!r} is not of the form table.key=value")
    table: Any = settings
    for name in tables:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise ConfigError(f"override {override!r}: {name!r} is a value, not a table", param=key.strip())
    table[last] = _value(text.strip())


def _value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if parsed.keys() == {"value"} else text


def check_tables(settings: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuse tables that no process reads.

    Raises:
        ConfigError: a table is unknown, or a key stands outside any table.
    """
    source = getattr(settings, "source", "the settings")
    for name, table in settings.items():
        if name not in known:
            raise ConfigError(f"{source}: unknown table [{name}]{_nearest(name, known)}", param=name)
        if not isinstance(table, dict):
            raise ConfigError(f"{source}: {name!r} must be a table: write [{name}] and keys under it", param=name)


def section(settings: Mapping[str, Any], name: str, model: type[Model]) -> Model:
    """One table as a checked config; a table that is not there gives the defaults.

    Raises:
        ConfigError: names every unknown, missing or out-of-range key, the file, and the nearest known key.
    """
    try:
        return model.model_validate(settings.get(name, {}))
    except ValidationError as error:
        found = error.errors()
        lines = [f"  {_complaint(name, model, entry)}" for entry in found]
        source = getattr(settings, "source", "the settings")
        raise ConfigError("\n".join([f"{source}:", *lines]), param=_key(name, found[0]["loc"])) from error


def _complaint(table: str, model: type[BaseModel], entry: Mapping[str, Any]) -> str:
    key = _key(table, entry["loc"])
    if entry["type"] == "extra_forbidden":
        return f"{key}: unknown key{_nearest(str(entry['loc'][-1]), _known_keys(model, entry['loc'][:-1]))}"
    if entry["type"] == "missing":
        return f"{key}: missing, and it has no default"
    given = "" if is_secret(key) or isinstance(entry["input"], dict) else f" (it is {mask(entry['input'])!r})"
    return f"{key}: {entry['msg']}{given}"


def _key(table: str, location: tuple[int | str, ...]) -> str:
    return ".".join([table, *map(str, location)])


def _nearest(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(sorted(known))}" if known else ""


def _known_keys(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """Names of the fields of the model that `location` leads to; empty where it leads through something else."""
    for part in location:
        if part not in model.model_fields:
            continue  # a list index, or the tag of a union
        inside = [kind for kind in _leaves(model.model_fields[str(part)].annotation) if issubclass(kind, BaseModel)]
        if len(inside) != 1:
            return []
        model = inside[0]
    return list(model.model_fields)


def _leaves(annotation: Any) -> list[type]:
    arguments = typing.get_args(annotation)
    if arguments:
        return [leaf for argument in arguments for leaf in _leaves(argument)]
    return [annotation] if isinstance(annotation, type) else []


def write_resolved(settings: Mapping[str, Any], path: Path) -> None:
    """Write the settings that a run uses as TOML, secrets masked.

    Args:
        settings: tables, each a dict or a config model. Keys that are None are left out, as TOML has no null.
    """
    plain = {name: t.model_dump(mode="json") if isinstance(t, BaseModel) else t for name, t in settings.items()}
    path.write_text(tomli_w.dumps(_resolved(plain)), encoding="utf-8")


def _resolved(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            key: MASK if is_secret(key) and inner else _resolved(inner)
            for key, inner in value.items()
            if inner is not None
        }
    if isinstance(value, list | tuple):
        return [_resolved(inner) for inner in value if inner is not None]
    return str(value) if isinstance(value, Path) else mask(value)


def is_secret(key: str) -> bool:
    """Whether a dotted key is a secret's, or one in a table of secrets."""
    return any(part.endswith(SECRET) or part == "keys" for part in key.lower().split("."))


def mask(value: Any) -> Any:
    """A text with the credentials of any URL or Authorization header in it hidden; other values as they are."""
    if not isinstance(value, str):
        return value
    value = re.sub(r"://\S*@", f"://{MASK}@", value)
    value = re.sub(r"\bBearer [!-~]+", f"Bearer {MASK}", value)
    return re.sub(r"([?&](?:password|api_key)=)[^&\s]*", rf"\1{MASK}", value)
