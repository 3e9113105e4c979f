from __future__ import annotations

import re
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import caption_parser
from agent.caption_parser import distinct, parse, same

PREFIX = "a photo of american bulldog, which is "
THREE = ["a dog standing tall", "a dog running fast", "a dog asleep"]
SENTENCE = PREFIX + THREE[1]
NUMBERINGS = ["{n}. {v}", "{n}) {v}", "({n}) {v}", "{n}: {v}", "- {v}", "* {v}", "• {v}", "Version {n}: {v}"]
NUMBERINGS += ["**Version {n}:** {v}", "**{n}.** {v}", "### {n}. {v}", "Option {n} - {v}", "{n} - {v}", "\t{n}.\t{v}  "]
DRESSES = ["{v}", '"{v}"', "“{v}.”", "'{v}'", "**{v}**", "`{v}`", "{v}.", "{v} (4 words)", PREFIX + "{v}"]
DRESSES += [
    PREFIX.upper() + "{v}.",
    '"A photo of an American Bulldog, which is {v}"',
    "which is {v}",
    "A photo of x, {v}",
]
FRAMES = [
    "{}",
    "Sure! Here are 3 versions:\n\n{}\n\nI hope this helps!",
    "```\n{}\n```",
    "```text\n{}\n```\nLet me know.",
]
FRAMES += ["<think>1. a first thought</think>\n{}", "{}\r\n\r\nNote: I kept the scene similar."]


@pytest.mark.parametrize("numbering", NUMBERINGS)
def test_versions_are_found_however_they_are_dressed(numbering: str):
    for dress, frame in product(DRESSES, FRAMES):
        lines = [numbering.format(n=n, v=dress.format(v=version)) for n, version in enumerate(THREE, start=1)]
        answer = frame.format("\n".join(lines))
        assert parse(answer, PREFIX) == THREE, answer


@pytest.mark.parametrize(
    ("answer", "versions"),
    [
        ("", []),
        ("\n \n", []),
        ("I'm sorry, but I can't help with that.", []),
        ("Sure! What would you like?", []),
        ("1.\n2.\n3. ...", []),
        ("a dog asleep", ["a dog asleep"]),
        ("a dog asleep\na dog awake", ["a dog asleep", "a dog awake"]),
        (SENTENCE, [THREE[1]]),
        ("1. a dog\n2. a cat 3. a bird", ["a dog", "a cat", "a bird"]),
        ('["a dog asleep", "a dog awake"]', ["a dog asleep", "a dog awake"]),
        ('[\n  "a dog asleep",\n  "a dog awake"\n]', ["a dog asleep", "a dog awake"]),
        ("1. 3 dogs\n2. 2 dogs at 9:30", ["3 dogs", "2 dogs at 9:30"]),
        ("1. A dog!\n2. a  dog\n3. a dog, asleep", ["A dog", "a dog, asleep"]),
        ("1. a dog\nwhich I like\n2. a cat", ["a dog", "a cat"]),
    ],
)
def test_odd_answers(answer: str, versions: list[str]):
    assert parse(answer, PREFIX) == versions


def test_what_ends_the_sentence_is_taken_off():
    assert parse("1. photo of dog: asleep, high quality\n2. awake", "photo of dog: ", ", high quality.") == [
        "asleep",
        "awake",
    ]


@given(st.text(max_size=300), st.text(max_size=20), st.text(max_size=20))
def test_any_text_gives_single_lines_that_say_something_and_differ(answer: str, prefix: str, suffix: str):
    found = parse(answer, prefix, suffix)
    assert len({same(version) for version in found}) == len(found)
    for version in found:
        assert version.isprintable() and version == version.strip() and "  " not in version
        assert any(character.isalpha() for character in version)


words = st.sampled_from(["dog", "cat", "grass", "red", "runs", "asleep", "tall", "near", "water"])
scenes = st.lists(words, min_size=1, max_size=8).map(" ".join)


@given(st.lists(scenes, min_size=1, max_size=12, unique=True), st.sampled_from(NUMBERINGS), st.sampled_from(DRESSES))
def test_what_was_listed_comes_back(versions: list[str], numbering: str, dress: str):
    lines = [numbering.format(n=n, v=dress.format(v=version)) for n, version in enumerate(versions, start=1)]
    assert parse("\n".join(lines), PREFIX) == versions


def test_distinct_ignores_case_punctuation_and_what_is_taken():
    said = ["A dog.", "a dog", "a  DOG!", "a cat", "the cat"]
    assert list(distinct(said, taken=["A cat"])) == ["A dog.", "the cat"]


class Seen:
    """A pattern that writes down what it is given."""

    def __init__(self, pattern: re.Pattern[str]):
        self.texts: list[str] = []
        self._pattern = pattern

    def match(self, text: str) -> re.Match[str] | None:
        self.texts.append(text)
        return self._pattern.match(text)

    def sub(self, new: str, text: str) -> str:
        self.texts.append(text)
        return self._pattern.sub(new, text)


@pytest.mark.parametrize("flood", [" ", "\n", "\t \r\n", '" ', "1. ", "( word", "a photo of ", "-", "\u2003"])
def test_what_the_slow_patterns_see_is_bounded(monkeypatch: pytest.MonkeyPatch, flood: str):
    slow = {name: Seen(getattr(caption_parser, name)) for name in ("_INLINE", "_MARKER", "_TALK", "_PREFIX", "_REMARK")}
    for name, seen in slow.items():
        monkeypatch.setattr(caption_parser, name, seen)
    answer = "1. a dog asleep\n" + flood * (10**6 // len(flood)) + "\n2. a dog awake"
    assert parse(answer, PREFIX)[0] == THREE[2]
    for seen in slow.values():
        assert not any(re.search(r"[^\S\n]{2}|\n\n", text) for text in seen.texts)
        assert sum(len(text) for text in seen.texts) <= caption_parser.MOST_CHARACTERS
    for name in slow.keys() - {"_INLINE"}:
        assert all(len(text) <= caption_parser.MOST_OF_A_LINE for text in slow[name].texts)


def test_versions_after_long_thoughts_or_on_one_long_line_are_found():
    assert parse(f"<think>{'hm ' * 50_000}</think>1. a dog asleep") == ["a dog asleep"]
    long = " ".join(f"{n}. a dog number {n} of a great many dogs" for n in range(1, 41))
    assert len(long) > caption_parser.MOST_OF_A_LINE and len(parse(long)) == 40
