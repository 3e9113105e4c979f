"""Caption perturbation: what is asked, what is kept of the answers, and where versions are cached."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence

import pytest

from agent import captions
from agent.caption_template import NAME
from agent.captions import Perturber, Subject
from agent.language import Conversation
from protocol.entries import Versions
from protocol.errors import BrokerFull, LanguageUnavailable, NotReady
from tests.agent.clock import Clock

PROMPT = "a photo of {class_name}, which is {caption}"
DOG = Subject("american bulldog", "a dog walking through a field of purple flowers")
CAT = Subject("abyssinian", "an Abyssinian cat on a couch")
DOWN = LanguageUnavailable("nobody there")


class Scripted:
    """A model that answers by a function of (conversation, seed), and writes down what it was asked."""

    name = "scripted"

    def __init__(self, answer: Callable[[Conversation, int], str | LanguageUnavailable]):
        self.rounds: list[list[tuple[Conversation, int]]] = []
        self._answer = answer

    def complete(self, conversations: Sequence[Conversation], seeds: Sequence[int]) -> list[str | LanguageUnavailable]:
        self.rounds.append(list(zip(conversations, seeds, strict=True)))
        return [self._answer(*asked) for asked in self.rounds[-1]]

    def close(self) -> None:
        pass


class Shelf(dict[str, Versions]):
    """What replicas share, in memory."""

    def __init__(self) -> None:
        self.lives: list[int] = []

    def get(self, names):
        return [dict.get(self, name) for name in names]

    def put(self, name, versions, ttl_s):
        self.lives.append(ttl_s)
        return self.setdefault(name, versions)


def asked_for(conversation: Conversation) -> int:
    return int(conversation[0]["content"].split()[-2])


def numbered(conversation: Conversation, seed: int) -> str:
    return "\n".join(f"{n}. a scene {seed % 9973} {n}" for n in range(1, asked_for(conversation) + 1))


def test_the_papers_prompts_to_the_letter():
    model = Scripted(numbered)
    Perturber(model, PROMPT)([DOG], 5)
    ((conversation, _),) = model.rounds[0]
    assert conversation == [
        {
            "role": "system",
            "content": "You are an editor tasked with subtly altering the scene described after a comma in a sentence. "
            "The goal is to change the scene slightly in no more than 10 words. Respond with 5 versions.",
        },
        {
            "role": "user",
            "content": "Given the sentence 'a photo of american bulldog, which is a dog walking through a field of "
            "purple flowers', slightly alter the scene described after the comma to depict a similar yet different "
            "scenario.",
        },
    ]


def test_all_subjects_are_asked_about_at_once_and_each_once():
    model = Scripted(numbered)
    found = Perturber(model, PROMPT)([DOG, CAT, DOG], 3)
    assert [len(asked) for asked in model.rounds] == [2]
    assert len({seed for _, seed in model.rounds[0]}) == 2
    assert found.keys() == {DOG, CAT}
    assert all(len(set(made.texts)) == 3 and made.by == ["scripted"] * 3 for made in found.values())


def test_a_subject_without_a_caption_is_its_class():
    model = Scripted(numbered)
    Perturber(model, PROMPT)([Subject("beagle", None)], 2)
    assert "'a photo of beagle, which is beagle'" in model.rounds[0][0][0][1]["content"]


def test_what_is_missing_is_asked_for_again_and_then_made_up():
    answers = iter(["1. a dog asleep\n2. a dog running", "1. a dog running!\n2. a dog barking", "nothing:"])
    counts: Counter[str] = Counter()
    model = Scripted(lambda conversation, seed: next(answers))
    made = Perturber(model, PROMPT, lambda what, many: counts.update({what: many}))([DOG], 5)[DOG]
    assert [asked_for(asked[0][0]) for asked in model.rounds] == [5, 3, 2]
    assert len({asked[0][1] for asked in model.rounds}) == 3  # another seed each time
    assert made.texts[:3] == ["a dog asleep", "a dog running", "a dog barking"]
    assert made.by == ["scripted"] * 3 + [NAME] * 2 and len(set(made.texts)) == 5
    assert counts == {"model": 3, "template": 2, "repeated": 1}


def test_long_versions_and_the_caption_itself_are_no_versions():
    ten, eleven = " ".join(["word"] * 10), " ".join(["word"] * 11)
    counts: Counter[str] = Counter()
    model = Scripted(lambda *asked: f"1. {eleven}\n2. {ten}\n3. {DOG.caption}.\n4. a dog")
    made = Perturber(model, PROMPT, lambda what, many: counts.update({what: many}))([DOG], 2)[DOG]
    assert made.texts == [ten, "a dog"]
    assert counts == {"model": 2, "long": 1, "repeated": 1}


def test_many_versions_are_asked_for_in_parts():
    model = Scripted(numbered)
    made = Perturber(model, PROMPT)([DOG], 60)[DOG]
    assert [asked_for(conversation) for conversation, _ in model.rounds[0]] == [25, 25, 10]
    assert len(set(made.texts)) == 60 and made.by == ["scripted"] * 60


def test_the_same_again_from_memory():
    counts: Counter[str] = Counter()
    model = Scripted(numbered)
    perturb = Perturber(model, PROMPT, lambda what, many: counts.update({what: many}))
    first = perturb([DOG], 4)
    assert perturb([DOG], 4) == first and len(model.rounds) == 1
    assert counts == {"model": 4, "cache": 4}
    perturb([DOG], 5)  # another m is another question
    assert len(model.rounds) == 2


def test_replicas_agree_on_what_the_first_of_them_made():
    shelf = Shelf()
    one, other = (Perturber(Scripted(lambda *asked, n=n: f"1. scene {n}\n2. other {n}"), PROMPT) for n in "ab")
    made = one([DOG], 2, shelf)
    assert other([DOG], 2, shelf) == made
    racing = Shelf()  # which already has the winner's when the loser, who found nothing, puts his
    racing.get = lambda names: [None] * len(names)
    racing.update(shelf)
    third = Perturber(Scripted(lambda *asked: "1. late\n2. later"), PROMPT)
    assert third([DOG], 2, racing) == made == third([DOG], 2)


def test_what_the_template_made_up_is_kept_for_its_purpose_alone():
    shelf, up, clock = Shelf(), False, Clock()
    perturb = Perturber(Scripted(lambda *asked: numbered(*asked) if up else DOWN), PROMPT, clock=clock)
    assert perturb([DOG], 3, shelf, "one")[DOG].by == [NAME] * 3
    up = True
    assert perturb([DOG], 3, shelf, "two")[DOG].by == ["scripted"] * 3  # the model is asked again
    other = Perturber(Scripted(numbered), PROMPT, clock=clock)
    for again in (perturb, other, Perturber(None, PROMPT)):  # from memory, from the shelf, and by the template
        assert again([DOG], 3, shelf, "one")[DOG].by == [NAME] * 3
    busy = Perturber(Scripted(numbered), PROMPT, clock=clock)
    assert busy([DOG], 3, shelf, "two")[DOG].by == ["scripted"] * 3
    assert busy([DOG], 3, shelf, "one")[DOG].by == [NAME] * 3  # though it has the model's in memory
    for again in (perturb, other):
        assert again([DOG], 3, shelf, "three") == perturb([DOG], 3, shelf, "two")
    assert shelf.lives == [captions.MADE_UP_S, captions.KEPT_S]
    clock.now += captions.MADE_UP_S
    assert perturb([DOG], 3, None, "one")[DOG].by == ["scripted"] * 3


def test_what_the_model_gave_in_part_is_completed_once_for_a_purpose():
    model = Scripted(lambda conversation, seed: f"1. scene {seed % 9973}" if len(model.rounds) < 3 else "nothing:")
    perturb = Perturber(model, PROMPT)
    made = perturb([DOG], 5, None, "one")
    assert made[DOG].by == ["scripted"] * 2 + [NAME] * 3
    asked = len(model.rounds)
    assert perturb([DOG], 5, None, "one") == made and len(model.rounds) == asked


@pytest.mark.parametrize("fails", ["get", "put"])
def test_a_shelf_that_is_full_or_away_costs_no_versions_and_no_second_question(fails: str, caplog):
    def fail(*args):
        raise BrokerFull("no room")

    shelf, counts = Shelf(), Counter()
    setattr(shelf, fails, fail)
    model = Scripted(numbered)
    perturb = Perturber(model, PROMPT, lambda what, many: counts.update({what: many}))
    made = perturb([DOG, CAT], 3, shelf)
    assert [made[subject].by for subject in (DOG, CAT)] == [["scripted"] * 3] * 2
    assert perturb([DOG, CAT], 3, shelf) == made and len(model.rounds) == 1
    assert counts == {"model": 6, "cache": 6}
    assert caplog.messages == ["versions of captions are not shared with other replicas: no room"]


def test_the_class_name_and_the_caption_stand_in_the_prompt():
    perturb = Perturber(None, PROMPT)
    assert perturb.fill_in(DOG, "a dog asleep") == "a photo of american bulldog, which is a dog asleep"


def test_an_outage_is_told_once_and_its_end_too(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    clock, up = Clock(), False
    perturb = Perturber(Scripted(lambda *asked: numbered(*asked) if up else DOWN), PROMPT, clock=clock)
    for number in range(5):
        assert perturb([Subject("dog", f"scene {number}")], 2).popitem()[1].by == [NAME] * 2
    assert caplog.messages == ["captions are perturbed by the template meanwhile: nobody there"]
    up = True
    assert perturb([CAT], 2)[CAT].by == ["scripted"] * 2
    assert len(caplog.messages) == 1  # other callers may still be failing
    clock.now += captions.QUIET_S
    assert perturb([DOG], 2)[DOG].by == ["scripted"] * 2
    assert caplog.messages[1:] == ["captions are perturbed by scripted again"]


def test_useless_answers_are_told_once(caplog: pytest.LogCaptureFixture):
    perturb = Perturber(Scripted(lambda *asked: "I'm sorry, I cannot."), PROMPT)
    for number in range(3):
        assert perturb([Subject("dog", f"scene {number}")], 2).popitem()[1].by == [NAME] * 2
    assert len(caplog.messages) == 1 and "too few versions for 1 captions of 1" in caplog.messages[0]


def test_one_answer_that_fails_does_not_hurt_the_others():
    model = Scripted(
        lambda conversation, seed: DOWN if "couch" in conversation[1]["content"] else numbered(conversation, seed)
    )
    found = Perturber(model, PROMPT)([DOG, CAT], 2)
    assert (found[DOG].by, found[CAT].by) == (["scripted"] * 2, [NAME] * 2)
    assert len(model.rounds) == 1  # the endpoint's client has tried already


def test_what_closing_cut_short_is_left_to_others(caplog: pytest.LogCaptureFixture):
    shelf = Shelf()
    perturb = Perturber(Scripted(lambda *asked: perturb.close() or DOWN), PROMPT)
    with pytest.raises(NotReady):
        perturb([DOG], 2, shelf)
    assert not shelf and not caplog.messages
