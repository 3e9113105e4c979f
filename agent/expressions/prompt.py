"""The texts of affective semantic injection: what a vision-language model is asked (Figure 4), and final prompts.

Final prompts have the form of the paper's descriptions (Figure 3) and name no action units by their codes. Knows
nothing of who answers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import numpy as np

from agent.expressions.action_units import ACTION_UNITS, untagged
from agent.expressions.retrieve import Described, Retrieved, adjective, modifier, one_of

INSTRUCTION = (
    "From a neutral face image, produce one sentence that preserves identity (gender presentation, hairstyle, skin "
    "tone, etc.) and only describes the expression changes expected for the target emotion, citing at least two Action "
    'Units (AUs). Skip unverifiable details and use this exact format: "Identity: [identity cues]; Expression: [target '
    'emotion]; [specific changes (AU codes)]"'
)
CONSTRAINT = (
    "These descriptions of {emotion} were retrieved from the Facial Action Coding System, with the intensities that "
    "are wanted:\n{descriptions}\nCite no Action Units but these: {units}."
)
NEUTRAL = "neutral"
SOMEBODY = "a person"
_WORDINGS = (  # {what}: the expression; {who}: the person; {how}: clauses that say what the face does
    "There is {what} on the face of {who}: {how}.",
    "There is {what} on the face of {who} as {how}.",
    "There is {what} on the face of {who}, where {how}.",
    "On the face of {who} there is {what}: {how}.",
    "On the face of {who}, {what} appears while {how}.",
    "{What} appears on the face of {who} as {how}.",
    "{What} comes over the face of {who}: {how}.",
    "{What} forms on the face of {who}, and {how}.",
    "{Who} shows {what}: {how}.",
    "{Who} shows {what} as {how}.",
    "{Who} reacts with {what}, and {how}.",
    "The face of {who} shows {what} while {how}.",
    "The face of {who} takes on {what} as {how}.",
    "The face of {who} changes to {what}: {how}.",
    "In view is the face of {who} with {what}, where {how}.",
    "A close view of {who} with {what} as {how}.",
)
_GENDERS = (("woman", r"\b(?:female|woman|lady|girl|feminine)\b"), ("man", r"\b(?:male|man|guy|boy|masculine)\b"))
_PERSON = re.compile(  # a cue that is a person, such as "a young woman with long hair"
    r"(?:an?\s+)?(?P<noun>(?:[\w-]+\s+){0,3}?(?:woman|man|lady|girl|guy|boy|person|female|male))(?P<more>\s.+)?",
    re.IGNORECASE,
)
_ARTICLE = re.compile(r"(?:an?|the)\s", re.IGNORECASE)
_JOINS = re.compile(r"(?:with|without|in|has|who|\w+ing)\b", re.IGNORECASE)


def question(emotion: str, retrieved: Retrieved | None) -> str:
    """What a model is asked about a first frame.

    Args:
        retrieved: what it may name; None: it is not told any (the VLM-only arm of Table 5).
    """
    asked = f"{INSTRUCTION}\nTarget emotion: {emotion}."
    if retrieved is None:
        return asked
    listed = "\n".join(f"{n}. {candidate.text}" for n, candidate in enumerate(retrieved.candidates, 1))
    units = "; ".join(f"{code} ({ACTION_UNITS[code].name})" for code in retrieved.units)
    return asked + "\n" + CONSTRAINT.format(emotion=emotion, descriptions=listed, units=units)


def templated(emotion: str, described: Described, identity: str | None, draw: np.random.Generator) -> Iterator[str]:
    """Prompts that say the same in less and less space: without the identity, with plain clauses, then with one of
    them less each time, those of the faintest action units first; at the end without any.

    Args:
        identity: who it is, such as a caption; None: nothing is known.
    """
    strength, wording = adjective(described.units, draw), one_of(_WORDINGS, draw)
    who = _described_person(identity) if identity else SOMEBODY
    for each in dict.fromkeys((who, SOMEBODY)):
        yield _worded(wording, expression(emotion, strength), each, described.text)
    loudest = sorted(described.units.items(), key=lambda unit: -unit[1])
    clauses = [ACTION_UNITS[code].phrase.format(modifier(r, draw)) for code, r in loudest]
    for count in range(len(clauses), 0, -1):
        yield _worded(_WORDINGS[0], expression(emotion, strength), SOMEBODY, ", ".join(clauses[:count]))
    yield f"{SOMEBODY} with {expression(emotion, strength)}"


def answered(identity: str, emotion: str, changes: str, units: Mapping[str, float], draw: np.random.Generator) -> str:
    """The prompt of a model's answer, as the paper's descriptions are.

    Args:
        identity, changes: what it wrote, with or without codes.
        units: intensity of each action unit that it named; {}: not known, which is told as a slight expression.
    """
    strength = adjective(units, draw) if units else "slight"
    return _worded(_WORDINGS[0], expression(emotion, strength), _described_person(identity), untagged(changes))


def expression(emotion: str, strength: str) -> str:
    """Such as "an expression of slight surprise"."""
    return "a neutral expression" if emotion == NEUTRAL else f"an expression of {strength} {emotion}"


def _worded(wording: str, what: str, who: str, how: str) -> str:
    return wording.format(what=what, What=_begun(what), who=who, Who=_begun(who), how=how.strip(" .,;:"))


def _begun(text: str) -> str:
    return text[:1].upper() + text[1:]


def _described_person(identity: str) -> str:
    """Cues such as "male-presenting, short dark hair, wearing glasses", as "a man with short dark hair, wearing
    glasses"; what is a person already, such as "fair-skinned woman" or "a boy in red", stays as it is."""
    cues = [cue for part in re.split(r"[,;]", untagged(identity)) if (cue := part.strip(" .:()[]"))]
    noun = next((noun for noun, pattern in _GENDERS if re.search(pattern, " ".join(cues), re.IGNORECASE)), "person")
    told, more = [cue for cue in cues if not _only_gender(cue)], ""
    if told and (found := _PERSON.fullmatch(told[0])):
        noun, more, told = found["noun"], found["more"] or "", told[1:]
    elif told == cues and told and _ARTICLE.match(told[0]):
        return ", ".join([told[0][0].lower() + told[0][1:], *told[1:]])
    article = "an" if noun[0].lower() in "aeiou" else "a"
    told = [cue[0].lower() + cue[1:] if _JOINS.match(cue) else cue for cue in told]
    joined = [cue if more or n or _JOINS.match(cue) else f"with {cue}" for n, cue in enumerate(told)]
    return f"{article} {noun}{more}{',' if more and joined else ''} {', '.join(joined)}".strip()


def _only_gender(cue: str) -> bool:
    """Whether a cue says nothing but the gender, such as "male-presenting" or "female appearance"."""
    rest = re.sub(r"\b(?:presenting|appearance|appearing|person|an?)\b|[^a-z0-9]", "", cue.casefold())
    return rest in {"", "female", "woman", "male", "man", "feminine", "masculine", "lady", "girl", "guy", "boy"}
