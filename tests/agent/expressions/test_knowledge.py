from __future__ import annotations

import json
from pathlib import Path

import pytest

from agent.expressions.action_units import named
from agent.expressions.emotions import emotion_of
from agent.expressions.knowledge import KnowledgeBase
from agent.expressions.settings import ExpressionsConfig
from protocol.errors import ConfigError, UnknownClass

BASIC = ("anger", "contempt", "disgust", "fear", "happiness", "sadness", "surprise")
CORE = {  # action units that each of the major variants has one of, in the literature's table
    "surprise": {"AU01", "AU05"},
    "fear": {"AU01", "AU05"},
    "disgust": {"AU09", "AU10"},
    "anger": {"AU04"},
    "sadness": {"AU01", "AU15"},
    "happiness": {"AU12"},
    "contempt": {"AU14"},
}


def opened(tmp_path: Path, toml: str = "", statistics: object = None, **config) -> KnowledgeBase:
    if toml:
        (tmp_path / "own.toml").write_text(toml)
        config["knowledge"] = tmp_path / "own.toml"
    if statistics is not None:
        (tmp_path / "units.json").write_text(statistics if isinstance(statistics, str) else json.dumps(statistics))
        config["statistics"] = tmp_path / "units.json"
    return KnowledgeBase.open(ExpressionsConfig(**config))


def refused(tmp_path: Path, *given, **config) -> str:
    with pytest.raises(ConfigError) as found:
        opened(tmp_path, *given, **config)
    return found.value.message


def mined(*patterns: object, name: str = "Fear") -> dict:
    return {
        "units": ["AU01"],
        "classes": {name: {"clips": 9, "patterns": list(patterns)}, "angry": {"clips": 2, "patterns": []}},
    }


def test_the_literature_has_several_entries_of_each_emotion(tmp_path: Path):
    base = opened(tmp_path)
    assert base.entries.keys() == {*BASIC, "neutral"}
    for emotion in BASIC:
        entries = base.of(emotion)
        assert len(entries) >= 5 and len({tuple(entry.units) for entry in entries}) == len(entries)
        assert all(entry.units.keys() & CORE[emotion] for entry in entries)
        assert all(2 <= len(entry.units) <= 7 for entry in entries)
    for entry in (entry for entries in base.entries.values() for entry in entries):
        assert sorted(named(entry.description)) == list(entry.units)  # nothing but the places is named so


@pytest.mark.parametrize(
    ("name", "emotion"),
    [("Happy", "happiness"), ("ANGRY", "anger"), ("surprised", "surprise"), ("Sad", "sadness"), ("NE", "neutral"),
     ("no_expression", "neutral"), ("Fearful", "fear"), ("disgust", "disgust"), ("Boredom", "boredom")],
)  # fmt: skip
def test_classes_are_known_by_the_names_of_datasets(name: str, emotion: str):
    assert emotion_of(name) == emotion


def test_own_names_go_first(tmp_path: Path):
    base = opened(tmp_path, aliases={"Wut": "angry", "fear": "sadness"})
    assert base.of("wut") == base.of("anger")
    assert base.of("Fear") == base.of("sadness")


def test_own_entries_may_go_by_own_names(tmp_path: Path):
    base = opened(tmp_path, "[[awe]]\nunits = { AU01 = 0.7 }\n", aliases={"awe": "surprise"})
    assert [dict(entry.units) for entry in base.of("surprise")] == [{"AU01": 0.7}]


def test_an_unknown_class_is_told_how_to_become_known(tmp_path: Path):
    with pytest.raises(UnknownClass, match=r"'bored'.*agent\.expressions\.aliases.*\[\[bored\]\].*knowledge"):
        opened(tmp_path).of("bored")


def test_own_entries_stand_in_the_place_of_ours_for_their_emotions(tmp_path: Path):
    toml = (
        "[[Surprised]]\nunits = { AU05 = 1, AU02 = 0.25 }\n[[bored]]\nunits = {AU43 = 0.5}\ndescription = 'lids {AU43}'"
    )
    base = opened(tmp_path, toml)
    (own,) = base.of("surprise")
    assert own.units == {"AU02": 0.25, "AU05": 1.0}
    assert own.description == "the upper eyelids lift {AU05} and the outer brows rise {AU02}"
    assert base.of("bored")[0].description == "lids {AU43}"
    assert len(base.of("fear")) == len(opened(tmp_path).of("fear"))


@pytest.mark.parametrize(
    ("toml", "told"),
    [
        ("surprise = []", "no entry"),
        ("surprise = 3", "no entry"),
        ("[surprise]\nunits = {AU01 = 1}", r"write \[\[surprise\]\]"),
        ("[[surprise]]", "entry is empty"),
        ("[[surprise]]\nunits = {}", "entry 1: the entry is empty"),
        ("[[surprise]]\nunits = {AU01 = 1}\n[[surprise]]\nunits = []", "entry 2: the entry is empty"),
        ("[[surprise]]\nunits = ['AU01']", "no table"),
        ("[[surprise]]\nunits = {AU99 = 0.5}", "unknown action unit 'AU99'"),
        ("[[surprise]]\nunits = {AU1 = 0.5}", "unknown action unit 'AU1'"),
        ("[[surprise]]\nunits = {AU01 = 0.0}", "AU01 = 0.0: an intensity is above 0"),
        ("[[surprise]]\nunits = {AU01 = 1.1}", "AU01 = 1.1"),
        ("[[surprise]]\nunits = {AU01 = nan}", "AU01 = nan"),
        ("[[surprise]]\nunits = {AU01 = true}", "AU01 = True"),
        ("[[surprise]]\nunits = {AU01 = 'much'}", "AU01 = 'much'"),
        ("[[surprise]]\nunits = {AU01 = 1}\ndescription = ''", r"once: \{AU01\}"),
        ("[[surprise]]\nunits = {AU01 = 1}\ndescription = 'a {AU01} b {AU02}'", "a place for each"),
        ("[[surprise]]\nunits = {AU01 = 1}\ndescription = 'a {AU01} b {AU01}'", "a place for each"),
        ("[[surprise]]\nunits = {AU01 = 1}\ntext = 'a'", "unknown key 'text'"),
        ("[[happy]]\nunits = {AU12 = 1}\n[[joy]]\nunits = {AU12 = 1}", "'happiness' has entries under another name"),
        ("[[surprise", "not valid TOML"),
    ],
)
def test_a_wrong_file_is_told_what_is_wrong(tmp_path: Path, toml: str, told: str):
    message = refused(tmp_path, toml)
    assert "own.toml" in message
    with pytest.raises(AssertionError, match=told):
        raise AssertionError(message)


def test_a_file_that_is_not_there(tmp_path: Path):
    assert "agent.expressions.knowledge" in refused(tmp_path, knowledge=tmp_path / "none.toml")
    with pytest.raises(ConfigError, match=r"agent\.expressions\.statistics"):
        KnowledgeBase.open(ExpressionsConfig(statistics=tmp_path / "none.json"))


def test_what_a_dataset_shows_is_added_to_the_literature(tmp_path: Path):
    found = mined(
        {"units": {"AU20": 0.8, "AU01": 0.5, "AU25": 0.4}, "part": 0.3}, {"units": {"AU05": 0.9}, "part": 0.2}
    )
    base, literature = opened(tmp_path, statistics=found), KnowledgeBase.open(ExpressionsConfig())
    *before, combination, single = base.of("fear")
    assert before == literature.of("fear")
    assert combination.units == {"AU01": 0.5, "AU20": 0.8, "AU25": 0.4}
    assert combination.description == (
        "the lips stretch {AU20} sideways, the inner brows rise {AU01} and the lips part {AU25}"
    )
    assert single.description == "the upper eyelids lift {AU05}"
    assert base.of("angry") == literature.of("angry")


def test_a_dataset_may_add_an_emotion_or_be_left_out(tmp_path: Path):
    found = mined({"units": {"AU43": 0.5}}, name="Boredom")
    assert [entry.units for entry in opened(tmp_path, statistics=found).of("boredom")] == [{"AU43": 0.5}]
    with pytest.raises(UnknownClass):
        opened(tmp_path, statistics=found, mined=False).of("boredom")
    path = tmp_path / "units.json"
    assert KnowledgeBase.open(ExpressionsConfig(), path).of("boredom")
    assert "boredom" not in KnowledgeBase.open(ExpressionsConfig(mined=False), path).entries


@pytest.mark.parametrize(
    ("statistics", "told"),
    [
        ("{", "no statistics"),
        ("[]", "no statistics"),
        ({"classes": {"fear": []}}, "no statistics"),
        (mined({"units": {}}), "entry is empty"),
        (mined(3), "entry is empty"),
        (mined({"units": {"AU98": 0.5}}), "unknown action unit 'AU98'"),
        (mined({"units": {"AU01": 3.5}}), "AU01 = 3.5"),
    ],
)
def test_wrong_statistics_are_told_what_is_wrong(tmp_path: Path, statistics: object, told: str):
    message = refused(tmp_path, "", statistics)
    assert "units.json" in message and told in message
