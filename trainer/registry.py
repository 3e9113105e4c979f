"""Names in the settings -> classes and functions, imported when asked for. A new task or feedback criterion is one new
file and one line here. Knows nothing of what the entries do.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Literal

from protocol.errors import ConfigError

Kind = Literal["task", "feedback"]

ENTRIES: dict[Kind, dict[str, str]] = {
    "task": {
        "classification": "trainer.tasks.classification:Classification",
        "reid": "trainer.tasks.reid:Reid",
        "face": "trainer.tasks.face:Face",
        "video": "trainer.tasks.video:Video",
    },
    "feedback": {
        "marginal": "trainer.selection.feedback:marginal",
        "entropy": "trainer.selection.feedback:entropy",
        "random": "trainer.selection.feedback:random",
        "similarity": "trainer.selection.similarity:similarity",
    },
}


def resolve(kind: Kind, name: str) -> Any:
    """The class or function registered under a name.

    Raises:
        ConfigError: no such name; the message lists those that exist.
    """
    known = ENTRIES[kind]
    if name not in known:
        raise ConfigError(f"unknown {kind} {name!r}; known: {', '.join(sorted(known))}", param=kind)
    module, attribute = known[name].split(":")
    return getattr(import_module(module), attribute)
