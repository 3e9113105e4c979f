from __future__ import annotations

from agent.rest import FIRST_S, LONGEST_S, Rest
from protocol.errors import LanguageUnavailable
from tests.agent.clock import Clock

DOWN, STILL = LanguageUnavailable("down"), LanguageUnavailable("still down")


def test_one_caller_tries_after_a_pause_and_the_others_when_that_worked():
    clock = Clock()
    rest = Rest(clock)
    assert rest.refusal() is None and rest.refusal() is None
    rest.failed(DOWN)
    assert rest.refusal() is DOWN is rest.reason
    clock.now += FIRST_S
    assert [rest.refusal(), rest.refusal(), rest.refusal()] == [None, DOWN, DOWN]
    rest.worked()
    assert rest.refusal() is rest.reason is None


def test_pauses_double_up_to_the_longest_and_begin_anew_after_success():
    clock = Clock()
    rest, pauses = Rest(clock), []
    for _ in range(7):
        rest.failed(DOWN)
        begun = clock.now
        while rest.refusal() is not None:
            clock.now += 1.0
        pauses.append(clock.now - begun)
    assert pauses == [30, 60, 120, 240, 480, 600, 600] and max(pauses) == LONGEST_S
    rest.worked()
    rest.failed(DOWN)
    clock.now += FIRST_S
    assert rest.refusal() is None


def test_failures_of_those_who_began_before_the_pause_do_not_make_it_longer():
    clock = Clock()
    rest = Rest(clock)
    for error in (DOWN, DOWN, DOWN, STILL):
        rest.failed(error)
    clock.now += FIRST_S - 1.0
    assert rest.refusal() is STILL
    clock.now += 1.0
    assert rest.refusal() is None
