"""Reads the versions of a scene out of what a language model answered, however it dressed them up.

Knows nothing of who answered, nor of how many versions are wanted.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator

MOST_CHARACTERS = 20_000  # of an answer that are read, after the model's thoughts; the rest is cut off
MOST_OF_A_LINE = 500  # characters; some patterns take longer than linear time
_PLAIN = str.maketrans("\u2018\u2019\u201c\u201d\u00ab\u00bb\u2013\u2014\u2022", '\'\'""""--*')
_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL | re.IGNORECASE)  # linear
_INLINE = re.compile(r"""(?<=\S)\s+(?=\(?\d{1,4}[.)]\s+\S)|(?<=")\s*,\s*(?=")""")  # several on one line
_MARKER = re.compile(
    r"""^\s*(?:
        [-*+]\s+                                                             # - a cat
      | \#*\s*[*_`"']*\(?\#?\d{1,4}\s*(?:[.):\]]|\s-\s)[*_`"']*(?!\d)        # 1. a cat, (2) a cat, **3.** a cat
      | [*_`]*(?:version|variation|variant|option|alternative|sentence|scene)s?\s*
        (?:\#?\d{1,4}|[a-z](?=\W))?\s*[*_`]*\s*[:.)-][*_`]*                  # Version 1: a cat
    )\s*""",
    re.VERBOSE | re.IGNORECASE,
)
_TALK = re.compile(
    r"(?:sure|certainly|of course|absolutely|okay|ok|great|here|below|these|this is|the following|note|please|let|"
    r"i|as an?(?: ai| editor| language)|hope|feel free|each|sorry|thank|you|if you|given|assistant|user|system)\b",
    re.IGNORECASE,
)
_PREFIX = re.compile(
    r"(?:an?\s+|the\s+)?(?:photo|photograph|picture|image)\s+of\s+[^,]*,\s*"
    r"(?:which|that)?\s*(?:is|are|shows|depicts)?\s+",
    re.IGNORECASE,
)
_REMARK = re.compile(r"\s*[(\[][^()\[\]]*\bwords?\b[^()\[\]]*[)\]]\s*$", re.IGNORECASE)  # "(8 words)"
_WRAPPING = " \"'`*_[]{}<>|\\#"
_ENDING = _WRAPPING + ".,;:!"


def parse(answer: str, prefix: str = "", suffix: str = "") -> list[str]:
    """The versions in an answer, in its order, each once.

    Numbered or listed lines are versions, and then nothing else is; without any, every line that is no talk is one.
    Quotes, marks, code fences and a repeated sentence around a version are taken off.

    Args:
        answer: any text.
        prefix, suffix: what stands before and after the scene in the sentence that was asked about.
    """
    lines = [line for line in _lines(answer) if not line.startswith("```")]
    listed = [line[found.end() :] for line in lines if (found := _MARKER.match(line))]
    found = [_scene(line, prefix, suffix) for line in listed or [line for line in lines if not _is_talk(line)]]
    return list(distinct(scene for scene in found if any(character.isalpha() for character in scene)))


def same(text: str) -> str:
    """Texts for which this is equal are the same version: it leaves out case, punctuation and spacing."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def distinct(versions: Iterable[str], taken: Iterable[str] = ()) -> Iterator[str]:
    """Those that are neither `taken` nor said before, in order."""
    seen = {same(text) for text in taken}
    for version in versions:
        if same(version) not in seen:
            seen.add(same(version))
            yield version


def _lines(answer: str) -> list[str]:
    """The lines that say something, with single spaces and of bounded length: what the other patterns may see."""
    text = _THOUGHT.sub("", answer)[:MOST_CHARACTERS].translate(_PLAIN)
    spaced = "\n".join(spoken for line in text.splitlines() if (spoken := " ".join(line.split())))
    return [line[:MOST_OF_A_LINE] for line in _INLINE.sub("\n", spaced).splitlines() if line]


def _is_talk(line: str) -> bool:
    bare = line.strip(_WRAPPING)
    return bare.endswith((":", "?")) or _TALK.match(bare) is not None


def _scene(line: str, prefix: str, suffix: str) -> str:
    """What a line says after the sentence's comma."""
    scene = _REMARK.sub("", _bare(line))
    repeated = prefix and scene.casefold().startswith(prefix.casefold())
    scene = scene[len(prefix) :] if repeated else scene[found.end() :] if (found := _PREFIX.match(scene)) else scene
    scene, ending = _bare(scene), suffix.strip(_ENDING)
    if ending and scene.casefold().endswith(ending.casefold()):
        scene = scene[: -len(ending)]
    return _bare(re.sub(r"^which\s+(?:is|are)\s+", "", scene, flags=re.IGNORECASE))


def _bare(text: str) -> str:
    """One line of printable characters, without what is wrapped around it."""
    printable = "".join(character if character.isprintable() else " " for character in text)
    return " ".join(printable.split()).lstrip(_WRAPPING).rstrip(_ENDING)
