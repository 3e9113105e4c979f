"""Versions of a scene without a language model: the caption in another light, place or view, always in the same way.

The same caption and class give the same versions in the same order everywhere. Knows nothing of prompts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import combinations, product

from agent.caption_parser import distinct

NAME = "template"
MOST = 1000  # versions that there always are

_PLACES = (
    "by a window", "near a tree", "beside a wall", "on a hill", "by the water", "in a garden", "on a path",
    "in a room", "near a fence", "on wet ground", "in tall grass", "on a terrace", "under a roof",
    "in a courtyard", "beside a road", "on a bench", "in a corner", "near some stones", "on pale sand",
    "in the shade", "by a doorway", "on dark soil", "near a lamp", "in the open",
)  # fmt: skip
_LIGHTS = (
    "at dusk", "at dawn", "at noon", "in bright sunlight", "in soft light", "under grey clouds", "in light rain",
    "in thin fog", "after the rain", "in golden light", "in dim light", "in cold light", "in warm light",
    "under blue sky", "at night", "in early autumn", "in late spring", "in winter light", "in summer heat",
    "in hazy air", "in harsh light", "with long shadows", "with soft shadows", "before a storm",
)  # fmt: skip
_VIEWS = (
    "seen from above", "seen from below", "seen from behind", "seen up close", "seen from afar", "seen side on",
    "in half profile", "at eye level", "from low down", "slightly off centre", "turned left", "turned right",
    "facing the viewer", "facing away", "partly hidden", "filling the frame", "with blurred background",
    "in sharp focus", "looking smaller", "tilted a little", "near the edge", "with space around", "in full view",
    "a step closer",
)  # fmt: skip
_DANGLING = {
    "a", "an", "the", "of", "in", "on", "at", "by", "to", "with", "and", "or", "near", "under", "over", "from", "into",
    "through", "onto", "beside", "behind", "between", "its", "his", "her", "their", "some", "is", "are", "very",
    "while", "for", "as", "that", "which",
}  # fmt: skip


def versions(caption: str | None, class_name: str, most_words: int) -> Iterator[str]:
    """Versions of a caption, at least `MOST` of them, all distinct and none longer than `most_words`.

    Args:
        caption: None: the scene is the class alone.
        most_words: 6 at least.
    """
    words = (caption or "").split()
    phrases = _phrases(f"{class_name}\0{caption or ''}")
    made = (version for phrase in phrases if (version := _joined(words, phrase, most_words)))
    return distinct(made, [caption or ""])


def _phrases(seed: str) -> Iterator[tuple[str, ...]]:
    """Every one alone, then every two of different kinds."""
    yield from _shuffled([(phrase,) for phrase in (*_PLACES, *_LIGHTS, *_VIEWS)], seed)
    pairs = [pair for kinds in combinations((_PLACES, _LIGHTS, _VIEWS), 2) for pair in product(*kinds)]
    yield from _shuffled(pairs, seed)


def _joined(words: list[str], phrases: tuple[str, ...], most_words: int) -> str | None:
    """The caption, shortened as the phrases need it, with them; None when it says one of them itself."""
    room = most_words - sum(len(phrase.split()) for phrase in phrases)
    core = words[:room]
    while core and len(core) < len(words) and core[-1].casefold().strip(",;") in _DANGLING:
        core = core[:-1]
    begin = " ".join(core).rstrip(",.;:!?")
    if any(phrase in begin.casefold() for phrase in phrases):
        return None
    return " ".join((begin, *phrases)).strip()


def _shuffled(phrases: Iterable[tuple[str, ...]], seed: str) -> list[tuple[str, ...]]:
    return sorted(phrases, key=lambda chosen: hashlib.sha256("\0".join((seed, *chosen)).encode()).digest())
