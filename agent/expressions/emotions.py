"""Emotions, by whatever name a dataset's classes have for them. Knows nothing of action units."""

from __future__ import annotations

from collections.abc import Mapping

ALIASES = {
    "anger": ("angry", "an"),
    "contempt": ("contemptuous", "scorn", "co"),
    "disgust": ("disgusted", "di"),
    "fear": ("fearful", "afraid", "scared", "fe"),
    "happiness": ("happy", "joy", "joyful", "ha"),
    "neutral": ("neutrality", "expressionless", "no expression", "calm", "ne"),
    "sadness": ("sad", "unhappy", "sa"),
    "surprise": ("surprised", "su"),
}
_EMOTIONS = {alias: emotion for emotion, aliases in ALIASES.items() for alias in (emotion, *aliases)}


def emotion_of(class_name: str, aliases: Mapping[str, str] | None = None) -> str:
    """The emotion that a class is of; a name that no table knows is an emotion of its own.

    Args:
        aliases: class name -> emotion, the user's own; they go first.
    """
    name = _plain(class_name)
    own = {_plain(alias): _plain(emotion) for alias, emotion in (aliases or {}).items()}
    name = own.get(name, name)
    return _EMOTIONS.get(name, name)


def _plain(name: str) -> str:
    """Case, spaces, dashes and underscores make no difference."""
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())
