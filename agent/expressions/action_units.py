"""Facial action units: what the coding system calls them, how a sentence tells of them, and their codes in a text.

Codes have two digits, as OpenFace writes them: AU04. Names are those of the Facial Action Coding System (Ekman and
Friesen). Knows nothing of emotions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

PARTS = {  # of a face -> the words that speak of it
    "brows": ("brow", "brows", "eyebrow", "eyebrows", "forehead"),
    "eyes": ("eye", "eyes", "eyelid", "eyelids", "lid", "lids", "gaze", "pupil", "pupils", "squint", "blink", "wink"),
    "nose": ("nose", "nostril", "nostrils", "nasolabial"),
    "cheeks": ("cheek", "cheeks", "dimple", "dimples"),
    "mouth": ("mouth", "lip", "lips", "smile", "grin", "teeth"),
    "chin": ("chin", "jaw"),
    "head": ("head",),
}


class ActionUnit(NamedTuple):
    name: str
    phrase: str  # a clause, with {} where the adverb goes
    parts: tuple[str, ...]  # of the face that words about it may speak of


ACTION_UNITS = {
    "AU01": ActionUnit("inner brow raiser", "the inner brows rise {}", ("brows",)),
    "AU02": ActionUnit("outer brow raiser", "the outer brows rise {}", ("brows",)),
    "AU04": ActionUnit("brow lowerer", "the brows draw {} down and together", ("brows",)),
    "AU05": ActionUnit("upper lid raiser", "the upper eyelids lift {}", ("eyes",)),
    "AU06": ActionUnit("cheek raiser", "the cheeks rise {}", ("cheeks", "eyes")),
    "AU07": ActionUnit("lid tightener", "the eyelids tighten {}", ("eyes",)),
    "AU09": ActionUnit("nose wrinkler", "the nose wrinkles {}", ("nose",)),
    "AU10": ActionUnit("upper lip raiser", "the upper lip lifts {}", ("mouth", "nose")),
    "AU11": ActionUnit("nasolabial deepener", "the folds beside the nose deepen {}", ("nose", "cheeks")),
    "AU12": ActionUnit("lip corner puller", "the corners of the mouth pull up {}", ("mouth",)),
    "AU14": ActionUnit("dimpler", "the corners of the mouth tighten {} inwards", ("mouth", "cheeks")),
    "AU15": ActionUnit("lip corner depressor", "the corners of the mouth drop {}", ("mouth",)),
    "AU16": ActionUnit("lower lip depressor", "the lower lip pulls down {}", ("mouth",)),
    "AU17": ActionUnit("chin raiser", "the chin pushes up {}", ("chin", "mouth")),
    "AU18": ActionUnit("lip pucker", "the lips pucker {}", ("mouth",)),
    "AU20": ActionUnit("lip stretcher", "the lips stretch {} sideways", ("mouth",)),
    "AU22": ActionUnit("lip funneler", "the lips push {} forwards", ("mouth",)),
    "AU23": ActionUnit("lip tightener", "the lips tighten {}", ("mouth",)),
    "AU24": ActionUnit("lip pressor", "the lips press {} together", ("mouth",)),
    "AU25": ActionUnit("lips part", "the lips part {}", ("mouth",)),
    "AU26": ActionUnit("jaw drop", "the jaw drops {}", ("chin", "mouth")),
    "AU27": ActionUnit("mouth stretch", "the mouth stretches {} open", ("mouth", "chin")),
    "AU28": ActionUnit("lip suck", "the lips roll {} inwards", ("mouth",)),
    "AU38": ActionUnit("nostril dilator", "the nostrils widen {}", ("nose",)),
    "AU43": ActionUnit("eyes closed", "the eyelids droop {}", ("eyes",)),
    "AU45": ActionUnit("blink", "the eyes blink {}", ("eyes",)),
    "AU51": ActionUnit("head turn left", "the head turns {} to the left", ("head",)),
    "AU52": ActionUnit("head turn right", "the head turns {} to the right", ("head",)),
    "AU53": ActionUnit("head up", "the head lifts {}", ("head", "chin")),
    "AU54": ActionUnit("head down", "the head lowers {}", ("head", "chin")),
    "AU64": ActionUnit("eyes down", "the gaze drops {}", ("eyes",)),
}

_JOINED = r"\s*(?:[,;+/&]|and\b)\s*"
_MARK = r"(?:AUs?|action\s+units?)[\s_#:-]{0,3}"
_CODES = re.compile(rf"\b{_MARK}[LR]?\d{{1,3}}[A-E]?\b(?:{_JOINED}(?:{_MARK})?[LR]?\d{{1,3}}[A-E]?\b)*", re.IGNORECASE)
_TAG = re.compile(r"[(\[{][^()\[\]{}]*[)\]}]")  # what stands in brackets
_TIDY = ((r"\s+", " "), (r"\s+([,.;:])", r"\1"), (r"([,;:])(?:\s*[,;:])+", r"\1"), (r"[(\[{]\s*[)\]}]", " "))


def named(text: str) -> list[str]:
    """The codes that a text names, each once, in its order: "AU4", "au 04", "AU04C", "AU1+2", "AUs 1, 2" and
    "action unit 4" too."""
    return list(dict.fromkeys(code for found in _CODES.finditer(text) for code in _expanded(found.group())))


def untagged(text: str) -> str:
    """The text without codes, and without brackets that hold some; single spaces, and no doubled punctuation."""
    while True:
        without = _TAG.sub(lambda tag: " " if _CODES.search(tag.group()) else tag.group(), text)
        without = _CODES.sub(" ", without)
        for pattern, replacement in _TIDY:
            without = re.sub(pattern, replacement, without)
        without = without.strip()
        if without == text:
            return text
        text = without


def parts_in(text: str) -> set[str]:
    """Parts of a face that a text speaks of."""
    words = set(re.findall(r"[a-z]+", text.casefold()))
    return {part for part, about in PARTS.items() if words.intersection(about)}


def _expanded(codes: str) -> Iterator[str]:
    """Of one group of codes."""
    return (f"AU{int(number):02d}" for number in re.findall(r"\d+", codes))
