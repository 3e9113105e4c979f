"""The knowledge base K of eq. 7: combinations of action units with their emotion and their description.

Its entries come from the literature (`knowledge.toml` beside this file), from a file of the user's own, and from the
statistics of a dataset. Knows nothing of prompts.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from agent.expressions.action_units import ACTION_UNITS
from agent.expressions.emotions import emotion_of
from agent.expressions.settings import ExpressionsConfig
from protocol.errors import ConfigError, UnknownClass

LITERATURE = "knowledge.toml"
_SLOT = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class Entry:
    """One (A_i, c_i, d_i), with r_ij for each unit."""

    emotion: str
    units: Mapping[str, float]  # code -> how far it goes at full strength, in (0, 1]
    description: str  # clauses with a slot for the adverb of each unit, such as {AU04}


@dataclass(frozen=True)
class KnowledgeBase:
    """Entries by emotion, in a fixed order."""

    entries: Mapping[str, Sequence[Entry]]  # of each emotion at least one
    aliases: Mapping[str, str]  # class name -> emotion, the user's own

    @classmethod
    def open(cls, config: ExpressionsConfig, statistics: Path | None = None) -> KnowledgeBase:
        """Raises ConfigError for a file that cannot be read, or says what no face can do.

        Args:
            statistics: of the dataset that is mounted, where the settings name no others; None: none.
        """
        literature = _of_toml(files(__package__).joinpath(LITERATURE).read_text(encoding="utf-8"), LITERATURE, {})
        own = _own(config.knowledge, config.aliases) if config.knowledge else {}
        statistics = config.statistics or statistics
        mined = _mined(statistics, config.aliases) if config.mined and statistics else {}
        entries = literature | own
        for emotion, found in mined.items():
            entries[emotion] = [*entries.get(emotion, []), *found]
        return cls(entries, config.aliases)

    def of(self, class_name: str) -> Sequence[Entry]:
        """The entries of a class's emotion. Raises UnknownClass."""
        emotion = emotion_of(class_name, self.aliases)
        if emotion not in self.entries:
            raise UnknownClass(
                f"class {class_name!r} is no emotion with action units; those are {', '.join(sorted(self.entries))}. "
                f"Say which of them it is in agent.expressions.aliases, or write entries [[{emotion}]] into a file and "
                "name it in agent.expressions.knowledge",
                param="class_name",
            )
        return self.entries[emotion]


def _text(path: Path, key: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        key = f"agent.expressions.{key}"
        raise ConfigError(f"cannot read {path} ({error}): check {key}", param=key) from error


def _own(path: Path, aliases: Mapping[str, str]) -> dict[str, list[Entry]]:
    return _of_toml(_text(path, "knowledge"), str(path), aliases)


def _of_toml(text: str, source: str, aliases: Mapping[str, str]) -> dict[str, list[Entry]]:
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source} is not valid TOML: {error}", param="agent.expressions.knowledge") from error
    entries: dict[str, list[Entry]] = {}
    for name, listed in tables.items():
        if not isinstance(listed, list) or not listed:
            raise _wrong(source, name, f"there is no entry: write [[{name}]] and `units` under it")
        emotion = emotion_of(name, aliases)
        if emotion in entries:
            raise _wrong(source, name, f"{emotion!r} has entries under another name already: choose one")
        entries[emotion] = [_entry(emotion, table, source, f"{name}, entry {n}") for n, table in enumerate(listed, 1)]
    return entries


def _mined(path: Path, aliases: Mapping[str, str]) -> dict[str, list[Entry]]:
    """Entries from the action units that a dataset's clips show often, their descriptions made of the units' phrases.
    A class of no emotion that is known becomes an emotion of its own."""
    entries: dict[str, list[Entry]] = {}
    try:
        classes = json.loads(_text(path, "statistics"))["classes"]
        patterns = [(name, pattern) for name, found in classes.items() for pattern in found["patterns"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} holds no statistics of action units: name the action_units.json of a dataset",
            param="agent.expressions.statistics",
        ) from error
    for name, pattern in patterns:
        emotion = emotion_of(name, aliases)
        table = {"units": pattern.get("units", {})} if isinstance(pattern, dict) else pattern
        entries.setdefault(emotion, []).append(_entry(emotion, table, str(path), f"{name}, a pattern"))
    return entries


def _entry(emotion: str, table: Any, source: str, place: str) -> Entry:
    """Raises ConfigError."""
    if not isinstance(table, dict) or not table.get("units"):
        raise _wrong(source, place, "the entry is empty: give `units`, such as { AU01 = 0.8, AU05 = 0.6 }")
    if unknown := table.keys() - {"units", "description"}:
        raise _wrong(source, place, f"unknown key {min(unknown)!r}: an entry has `units` and `description`")
    units = table["units"]
    if not isinstance(units, dict):
        raise _wrong(source, place, "`units` is no table: write { AU01 = 0.8, AU05 = 0.6 }")
    for code, intensity in units.items():
        if code not in ACTION_UNITS:
            raise _wrong(source, place, f"unknown action unit {code!r}: known are {', '.join(ACTION_UNITS)}")
        if isinstance(intensity, bool) or not isinstance(intensity, int | float) or not 0.0 < intensity <= 1.0:
            raise _wrong(source, place, f"{code} = {intensity!r}: an intensity is above 0 and at most 1")
    description = table.get("description", _phrases(list(units)))
    if not isinstance(description, str) or sorted(_SLOT.findall(description)) != sorted(units):
        wanted = ", ".join(f"{{{code}}}" for code in units)
        raise _wrong(source, place, f"`description` must have a place for each unit's adverb, once: {wanted}")
    return Entry(emotion, dict(sorted(units.items())), description)


def _phrases(codes: Sequence[str]) -> str:
    """A description from the units' own phrases."""
    clauses = [ACTION_UNITS[code].phrase.replace("{}", f"{{{code}}}") for code in codes]
    return " and ".join([", ".join(clauses[:-1]), clauses[-1]] if len(clauses) > 1 else clauses)


def _wrong(source: str, place: str, told: str) -> ConfigError:
    return ConfigError(f"{source}: {place}: {told}", param="agent.expressions.knowledge")
