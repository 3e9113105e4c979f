"""Clips that are told in sentences: what drawn people do, in the words that prompts are composed of.

Half of the clips act out an entry of the knowledge base of `agent.expressions` and are told in its description; the
others follow the world's own prototypes and are told unit by unit. Knows nothing of models.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from importlib.resources import files

import numpy as np

from agent.expressions import prompt
from agent.expressions.action_units import ACTION_UNITS
from agent.expressions.knowledge import LITERATURE, KnowledgeBase
from agent.expressions.retrieve import LEVELS, Described, modifier, retrieve
from agent.expressions.settings import FIXED, ExpressionsConfig
from tests.expressions.portrait import UNITS, Identity
from tests.expressions.world import EMOTIONS, Clip, draw, prototype

STAND_INS = {"AU11": "AU10", "AU16": "AU25", "AU22": "AU25", "AU24": "AU23", "AU27": "AU26", "AU43": "AU07"}
INTENSITY = (0.25, 1.0)  # range of r of eq. 9
TOLD = 6  # sentences of each clip
PLAIN = 0.15  # part of the sentences that name the emotion only
WHO = "a an man woman person bald with and short long hair fringe glasses beard"


def told_clips(
    people: Sequence[Identity], each: int, seed: int, *, size: int, frames: int
) -> Iterator[tuple[Clip, list[str]]]:
    """So many clips of each emotion, and what can be said of each."""
    chance, base = np.random.default_rng(seed), KnowledgeBase.open(ExpressionsConfig())
    for emotion in EMOTIONS:
        for number in range(each):
            who, own = people[chance.integers(len(people))], int(chance.integers(2**31))
            if number % 2:
                described = retrieve(base.of(emotion), 1, INTENSITY, chance).candidates[0]
            else:
                described = _described(prototype(emotion, np.random.default_rng(own)), chance)
            clip = draw(emotion, who, seed=own, size=size, frames=frames, apex=drawable(described.units))
            yield clip, [_told(clip, described, chance) for _ in range(TOLD)]


def drawable(units: dict[str, float]) -> dict[str, float]:
    """The world's units that come nearest."""
    shown: dict[str, float] = {}
    for unit, intensity in units.items():
        near = STAND_INS.get(unit, unit)
        if near in UNITS and near != "AU45":  # a blink is over before the apex
            shown[near] = max(intensity, shown.get(near, 0.0))
    return shown


def _described(units: dict[str, float], chance: np.random.Generator) -> Described:
    clauses = [ACTION_UNITS[unit].phrase.format(modifier(r, chance)) for unit, r in units.items()]
    chance.shuffle(clauses)
    return Described(units, " and ".join([", ".join(clauses[:-1]), clauses[-1]] if len(clauses) > 1 else clauses))


def _told(clip: Clip, described: Described, chance: np.random.Generator) -> str:
    """One sentence: mostly the first, and fullest, that the template has."""
    if not described.units:
        return f"{clip.caption} with {prompt.expression('neutral', '')}"
    if chance.random() < PLAIN:
        return FIXED.format(class_name=clip.emotion)
    versions = list(prompt.templated(clip.emotion, described, clip.caption, chance))
    return versions[0 if chance.random() < 0.6 else chance.integers(len(versions))]


def words() -> list[str]:
    """Every word that sentences are made of."""
    chance, base = np.random.default_rng(0), KnowledgeBase.open(ExpressionsConfig())
    texts = [WHO, files("agent.expressions").joinpath(LITERATURE).read_text(encoding="utf-8"), FIXED, *EMOTIONS]
    texts += [unit.phrase for unit in ACTION_UNITS.values()]
    texts += [word for level in LEVELS for word in (*level.adverbs, *level.adjectives)]
    for entry in base.of("fear"):
        for _ in range(60):
            texts += prompt.templated("fear", Described(entry.units, ""), WHO, chance)
    return sorted(set(re.findall(r"[a-z]{2,}", " ".join(texts).casefold())))
