"""Whether what a vision-language model answered can be used: its format, its emotion, and the action units it names.

An answer that names an action unit which was not retrieved is a hallucination (ARGen, supplement G). Knows nothing of
who answered.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

from agent.expressions.action_units import ACTION_UNITS, named, parts_in, untagged
from agent.expressions.emotions import emotion_of
from agent.expressions.retrieve import LEVELS

FEWEST = 2  # action units that an answer is to name, as the instruction says
MOST_CHARACTERS = 2000  # of an answer that are read
_PLAIN = str.maketrans("\u2018\u2019\u201c\u201d\u00ab\u00bb", '\'\'""""')
_FORMAT = re.compile(
    r"""identity\s*:\s*(?P<identity>[^;\n]+?)\s*[;\n]\s*
        expression\s*:\s*(?P<emotion>[^;\n]+?)\s*[;\n]\s*
        (?P<changes>[^\n]+)""",
    re.VERBOSE | re.IGNORECASE,
)
_WRAPPING = " \t\n\"'`*.[]"


class Answer(NamedTuple):
    """One sentence, taken apart."""

    identity: str
    emotion: str  # as it was written
    changes: str
    units: tuple[str, ...]  # codes that it names


class Refused(NamedTuple):
    """Why an answer is not used."""

    reason: str  # "format", "emotion", "hallucinated", "misplaced", "few" or, found by who asks, "long"


def parse(text: str) -> Answer | None:
    """The sentence in the format that was asked for; None: there is none, or more than that.

    Marks and quotes around it and its parts are taken off, and line breaks may stand for semicolons.
    """
    text = re.sub(r"<think>.*?(?:</think>|\Z)", "", text, flags=re.DOTALL | re.IGNORECASE)[: MOST_CHARACTERS + 1]
    text = text.translate(_PLAIN).replace("*", "").strip(_WRAPPING)
    found = _FORMAT.fullmatch(text) if len(text) <= MOST_CHARACTERS else None
    if found is None:
        return None
    identity, emotion = (found[part].strip(_WRAPPING) for part in ("identity", "emotion"))
    changes = found["changes"].strip(" \t\"'`")
    spoken = all(any(map(str.isalpha, untagged(part))) for part in (identity, emotion, changes))
    return Answer(identity, emotion, changes, tuple(named(changes))) if spoken else None


def check(
    text: str, emotion: str, allowed: Collection[str] | None, aliases: Mapping[str, str] | None = None
) -> Answer | Refused:
    """An answer that may be used, or why not.

    Args:
        emotion: the one that was asked for.
        allowed: codes that were retrieved; None: it was told none, and what it names is not looked at.
        aliases: other names of emotions, the user's own.
    """
    answer = parse(text)
    if answer is None:
        return Refused("format")
    if emotion not in (emotion_of(answer.emotion, aliases), emotion_of(_bare(answer.emotion), aliases)):
        return Refused("emotion")
    if allowed is not None and hallucinated(answer, allowed):
        return Refused("hallucinated")
    if allowed is not None and misplaced(answer):
        return Refused("misplaced")
    if len(answer.units) < min(FEWEST, FEWEST if allowed is None else len(allowed)):
        return Refused("few")
    return answer


def _bare(emotion: str) -> str:
    """Without the strength that it is told with: "slight fear"."""
    strength, _, rest = emotion.partition(" ")
    return rest if any(strength.casefold() in level.adjectives for level in LEVELS) else emotion


def hallucinated(answer: Answer, retrieved: Collection[str]) -> list[str]:
    """Codes that it names and that were not retrieved."""
    return [code for code in (*answer.units, *named(answer.identity)) if code not in retrieved]


def misplaced(answer: Answer) -> list[str]:
    """Codes that it gives to another part of the face than they are of, such as "eyes widened (AU15)". The words
    in the clause of a code count; a clause that speaks of no part may be about any."""
    wrong = []
    for clause in re.split(r"[,;]|\band\b|\bwhile\b", re.sub(r"\([^()]*\)", _unbroken, answer.changes)):
        spoken, codes = parts_in(untagged(clause)), [code for code in named(clause) if code in ACTION_UNITS]
        wrong += [code for code in codes if spoken and not spoken.intersection(ACTION_UNITS[code].parts)]
    return wrong


def _unbroken(tag: re.Match[str]) -> str:
    """The codes in brackets, so that a clause is not cut between them."""
    return "(" + "+".join(named(tag.group())) + ")"
