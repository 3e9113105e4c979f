from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from agent.expressions.compose import Asked, Composed
from generator_service.rl import clip_pairs
from generator_service.rl.clip_pairs import Pair, Source
from protocol import clips
from protocol.errors import InvalidRequest, LanguageUnavailable, NoFace, UnknownClass
from tests.generator_service import tiny_t2v
from tests.generator_service.rl.clip_place import drawn, policy_job, source


@pytest.fixture(scope="module")
def backend(tmp_path_factory):
    return tiny_t2v.open_backend(tiny_t2v.save_checkpoint(tmp_path_factory.mktemp("t2v")))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return drawn(tmp_path_factory.mktemp("clips"), {"neutral": 8, "surprise": 2, "fear": 1}, subjects=5)


@pytest.fixture
def given(dataset, backend) -> Source:
    return source(dataset, backend)


def ended(pieces):
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return end.value


# ---------------------------------------------------------------- which pairs there are


def test_neutral_frames_meet_each_emotion(given, dataset):
    train, held_out = given.split(policy_job(validation_pairs=100))
    every = train + held_out
    neutral = {entry.id for entry in dataset.samples if entry.class_name == "neutral"}
    assert {pair.identity.sample_id for pair in every} == neutral and len(neutral) == 8
    assert sorted(pair.name for pair in every) == sorted(
        f"{one}:0:{emotion}" for one in neutral for emotion in ("fear", "surprise")
    )


def test_without_neutral_classes_frames_of_all_classes_meet_the_other_emotions(dataset, backend):
    train, held_out = source(dataset, backend, neutral_classes=[]).split(policy_job(validation_pairs=100))
    every = train + held_out
    assert all(pair.class_name != pair.identity.class_name for pair in every)
    assert len(every) == 11 * 3 - 11  # and nobody's neutral frame is left out for being of the emotion "neutral"


def test_classes_and_number_of_pairs_can_be_said(given):
    named = policy_job(classes=["fear"], validation_pairs=100)
    assert {pair.class_name for part in given.split(named) for pair in part} == {"fear"}
    every = {pair.name for part in given.split(policy_job(validation_pairs=100)) for pair in part}
    draws = set()
    for seed in range(5):
        some = [
            pair.name for part in given.split(policy_job(pairs=6, seed=seed, validation_pairs=100)) for pair in part
        ]
        assert len(some) == len(set(some)) == 6 and set(some) <= every
        draws.add(frozenset(some))
    assert len(draws) > 1
    with pytest.raises(UnknownClass, match=r"no class 'joy': use some of .*surprise") as raised:
        given.split(policy_job(classes=["joy"]))
    assert raised.value.param == "classes"


@pytest.mark.parametrize("seed", range(5))
def test_no_person_is_in_both_parts(given, seed):
    job = policy_job(seed=seed, validation=0.4, validation_pairs=100)
    train, held_out = given.split(job)
    people, others = ({pair.person for pair in part} for part in (train, held_out))
    assert train and held_out and not people & others
    assert len(others) == round(0.4 * len(people | others))
    assert given.split(job) == (train, held_out)
    fewer = given.split(policy_job(seed=seed, validation=0.4, validation_pairs=2))
    assert fewer == (train, held_out[:2])


def test_someone_is_always_held_out_and_someone_learnt_from(given):
    for part in (0.01, 0.99):
        train, held_out = given.split(policy_job(validation=part))
        assert train and held_out


def test_clips_of_unknown_people_are_people_of_their_own(given):
    one, other = (Pair(given.expressions.identities[at]._replace(subject=None), "fear") for at in (0, 1))
    assert one.person != other.person


# ---------------------------------------------------------------- their texts


def test_texts_are_composed_for_the_emotion_and_fit(given, backend, tmp_path):
    train, _ = given.split(policy_job())
    worded = ended(given.worded(train, policy_job(), tmp_path))
    assert [(pair.identity, pair.class_name) for pair in worded] == [(pair.identity, pair.class_name) for pair in train]
    for pair in worded:
        read, most = backend.prompt_length(pair.prompt)
        assert read <= most and pair.class_name in pair.prompt and "AU" not in pair.prompt
    assert len({pair.prompt for pair in worded}) > 2


def test_a_fixed_text_names_the_class(dataset, backend, tmp_path):
    fixed = source(dataset, backend, composer="fixed", fixed_prompt="a face of {class_name}")
    train, _ = fixed.split(policy_job())
    worded = ended(fixed.worded(train, policy_job(), tmp_path))
    assert {pair.prompt for pair in worded} == {"a face of fear", "a face of surprise"}


def test_what_was_composed_once_is_not_composed_again(given, tmp_path):
    """A model would say something else; here it counts."""

    class Counting:
        calls, knowledge = 0, given.expressions.composer.knowledge

        def __call__(self, asked: list[Asked], store=None) -> list[Composed]:
            assert all(one.image().shape == (32, 32, 3) for one in asked)
            self.calls += len(asked)
            return [Composed(f"{self.calls} {one.class_name}", "model", []) for one in asked]

        def close(self) -> None:
            pass

    composer = Counting()
    counted = replace(given, expressions=replace(given.expressions, composer=composer))
    train, _ = counted.split(policy_job())
    first = ended(counted.worded(train, policy_job(), tmp_path))
    assert composer.calls == len(train) and ended(counted.worded(train, policy_job(), tmp_path)) == first
    assert composer.calls == len(train)


def test_composing_that_was_killed_goes_on_where_it_was(given, tmp_path, monkeypatch):
    monkeypatch.setattr(clip_pairs, "CHUNK", 3)
    train, _ = given.split(policy_job())
    whole = ended(given.worded(train, policy_job(), tmp_path / "a"))
    compose, asked = Source._composed, []

    def counted(self, pairs, job):
        if len(asked) == 6:
            raise LanguageUnavailable("gone")
        asked.extend(pairs)
        return compose(self, pairs, job)

    monkeypatch.setattr(Source, "_composed", counted)
    with pytest.raises(LanguageUnavailable):
        ended(given.worded(train, policy_job(), tmp_path / "b"))
    asked.append(None)
    assert ended(given.worded(train, policy_job(), tmp_path / "b")) == whole
    assert [pair for pair in asked if pair] == train


def test_the_first_frame_is_the_identity_s(given, dataset):
    pair = given.split(policy_job())[0][0]
    entry = next(entry for entry in dataset.samples if entry.id == pair.identity.sample_id)
    assert (given.first_frame(pair) == clips.read(entry.path)[0]).all()
    later = Pair(pair.identity._replace(frame=2), pair.class_name)
    assert (given.first_frame(later) == clips.read(entry.path)[2]).all()
    assert (given.first_frame(later) != given.first_frame(pair)).any()


# ---------------------------------------------------------------- what there has to be


def test_what_is_missing_is_named(given, dataset, backend, tmp_path):
    given.check(policy_job())
    with pytest.raises(InvalidRequest, match="dataset of clips"):
        replace(given, dataset=None).check(policy_job())
    with pytest.raises(InvalidRequest, match=r"\[generator.faces\]"):
        replace(given, faces=None).check(policy_job())
    replace(given, faces=None).check(policy_job(method="random"))
    stored = replace(given, expressions=replace(given.expressions, reads_pixels=False))
    with pytest.raises(InvalidRequest, match=r"generator\.faces\.openface\.binary"):
        stored.check(policy_job())
    stored.check(policy_job(method="random"))
    alone = drawn(tmp_path / "alone", {"neutral": 3, "fear": 1}, subjects=1)
    with pytest.raises(NoFace, match="clips of 1 people"):
        source(alone, backend).check(policy_job())
    with pytest.raises(NoFace, match="draw more `pairs`"):
        source(alone, backend).check(policy_job(pairs=2))
    strange = replace(given, settings=given.settings.model_copy(update={"aliases": {"fear": "ennui"}}))
    strange = replace(strange, expressions=source(dataset, backend, aliases={"fear": "ennui"}).expressions)
    with pytest.raises(UnknownClass, match="fear"):
        strange.check(policy_job())


def test_what_decides_the_pairs_is_in_the_digest(given, dataset, backend, tmp_path):
    assert given.digest() == source(dataset, backend).digest()
    knowledge = tmp_path / "own.toml"
    others = []
    for strength in (0.5, 0.6):  # another content of the same file
        knowledge.write_text(f"[[fear]]\nunits = {{ AU01 = {strength} }}\n")
        others.append(source(dataset, backend, knowledge=knowledge))
    others += [
        source(dataset, backend, candidates=1),
        replace(given, expressions=replace(given.expressions, reader="another model in the same place")),
        replace(given, negative_prompt=None),
        replace(given, faces=given.faces.model_copy(update={"min_side": 1})),
        replace(given, expressions=replace(given.expressions, identities=given.expressions.identities[1:])),
    ]
    assert len({given.digest(), *(other.digest() for other in others)}) == 1 + len(others)
    assert np.all([len(other.digest()) == 64 for other in others])
