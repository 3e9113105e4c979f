from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.expressions.knowledge import KnowledgeBase
from agent.expressions.plan import IdentityFrame, plan_expressions
from agent.expressions.settings import ExpressionsConfig
from agent.settings import AgentConfig
from protocol.errors import InvalidRequest, NoFace, UnknownClass
from protocol.messages import ClassShortage, Feedback, MarginalSample, WeightsRef, sample_id, seed_of
from protocol.video import GuidanceCurve

WEIGHTS = WeightsRef(name="t2v", version=2, digest="abc")
CLASSES = ("angry", "disgust", "fear", "happy", "neutral", "sad", "surprise")
BASE = KnowledgeBase.open(ExpressionsConfig())


def frames(**count: int) -> list[IdentityFrame]:
    return [
        IdentityFrame(f"{name}-{n}", n % 3, name, f"who-{n % 2}", f"person {n}")
        for name, many in count.items()
        for n in range(many)
    ]


def short(**images: int) -> list[ClassShortage]:
    return [ClassShortage(label=CLASSES.index(name), class_name=name, images=n) for name, n in images.items()]


def marginal(name: str, class_name: str, **more) -> MarginalSample:
    label = CLASSES.index(class_name) if class_name in CLASSES else 0
    return MarginalSample(sample_id=name, label=label, class_name=class_name, score=0.1, **more)


def feedback(*samples: MarginalSample, number: int = 3, **fields) -> Feedback:
    return Feedback(run="r", feedback=number, model_version=40, samples=list(samples), **fields)


def planned(
    asked: Feedback, identities: list[IdentityFrame], has_policy: bool = False, agent: dict | None = None, **own
):
    config = AgentConfig.model_validate({"expressions": own} | (agent or {}))
    return plan_expressions(asked, config, WEIGHTS, identities, BASE, has_policy=has_policy)


def rows(units):
    return [row for unit in units for row in unit.rows]


def test_a_scarce_emotion_is_joined_to_neutral_frames():
    units = planned(feedback(classes=short(fear=3, disgust=2)), frames(neutral=9, happy=9), clips_per_unit=4)
    assert [(row.class_name, row.label, row.source_id, row.index) for row in rows(units)] == [
        *(("fear", 2, "class:fear", n) for n in range(3)),
        *(("disgust", 1, "class:disgust", n) for n in range(2)),
    ]
    assert [row.sample_id for row in rows(units)] == [
        sample_id("r", 3, row.source_id, row.index) for row in rows(units)
    ]
    assert [row.seed for row in rows(units)] == [seed_of(row.sample_id) for row in rows(units)]
    assert all(row.init_id.startswith("neutral-") for row in rows(units))
    for row in rows(units):
        number = int(row.init_id.split("-")[1])
        assert (row.init_frame, row.caption) == (number % 3, f"person {number}")
    assert [(len(unit.rows), unit.unit, unit.units) for unit in units] == [(4, 0, 2), (1, 1, 2)]
    assert all(unit.expressions and unit.frames == 16 and unit.fps == 8.0 and unit.strength == 1.0 for unit in units)
    assert all(unit.versions is None and unit.weights == WEIGHTS and unit.model_version == 40 for unit in units)


def test_a_marginal_sample_gets_clips_of_its_class_from_other_first_frames():
    asked = feedback(marginal("s1", "sad"), marginal("s2", "fear"), images_per_sample=2)
    found = rows(planned(asked, frames(neutral=9)))
    assert [(row.source_id, row.class_name, row.index) for row in found] == [
        ("s1", "sad", 0), ("s1", "sad", 1), ("s2", "fear", 0), ("s2", "fear", 1),
    ]  # fmt: skip
    assert len(rows(planned(feedback(marginal("s1", "sad")), frames(neutral=1), agent={"images_per_sample": 4}))) == 4


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 50))
def test_no_first_frame_comes_again_before_all_came(images: int, many: int, number: int):
    units = planned(
        feedback(classes=short(fear=images, disgust=3), number=number), frames(neutral=many, fear=4, happy=3)
    )
    used = [row.init_id for row in rows(units)]
    for start in range(len(used)):
        window = used[start : start + many]
        assert len(set(window)) == len(window)
    counts = Counter(used)
    assert max(counts.values()) - min(counts.values(), default=0) <= 1 and all(
        name.startswith("neutral") for name in counts
    )


def test_both_subjects_come_before_one_comes_again():
    used = [
        int(row.init_id.split("-")[1]) % 2 for row in rows(planned(feedback(classes=short(fear=8)), frames(neutral=8)))
    ]
    assert all({a, b} == {0, 1} for a, b in zip(used[::2], used[1::2], strict=True))


def test_the_order_is_that_of_the_feedback():
    identities = frames(neutral=30)

    def used(number: int) -> list[str]:
        return [row.init_id for row in rows(planned(feedback(classes=short(fear=30), number=number), identities))]

    assert used(0) == used(0) != used(1) and sorted(used(0)) == sorted(used(1))


def test_without_neutral_clips_others_lend_their_frames_but_never_scarce_ones():
    asked = feedback(classes=short(fear=20))
    found = {row.init_id.split("-")[0] for row in rows(planned(asked, frames(fear=9, happy=5, sad=5)))}
    assert found == {"happy", "sad"}
    assert {
        row.init_id[:5] for row in rows(planned(asked, frames(happy=5, neutral=5), neutral_classes=["Happiness"]))
    } == {"happy"}
    mixed = planned(asked, frames(happy=5, neutral=5), neutral_classes=[])
    assert {row.init_id.split("-")[0] for row in rows(mixed)} == {"happy", "neutral"}


def test_a_scarce_neutral_class_lends_none():
    found = rows(planned(feedback(classes=short(neutral=4)), frames(neutral=5, happy=2)))
    assert {row.init_id for row in found} == {"happy-0", "happy-1"} and {row.class_name for row in found} == {"neutral"}


@pytest.mark.parametrize(
    ("identities", "told"), [([], "none is usable"), (frames(fear=4), "all 4 of its neutral frames are of fear")]
)
def test_without_a_first_frame_there_is_advice(identities: list[IdentityFrame], told: str):
    with pytest.raises(NoFace, match=f"{told}.*generator.faces"):
        planned(feedback(classes=short(fear=1)), identities)


@pytest.mark.parametrize(
    ("has_policy", "wanted", "expected"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_a_policy_chooses_where_there_is_one_and_it_may(has_policy: bool, wanted: bool, expected: bool):
    (unit,) = planned(feedback(classes=short(fear=1)), frames(neutral=1), has_policy, policy=wanted, steps=15)
    assert (unit.policy, unit.steps) == (expected, 15)


def test_the_arm_of_fixed_guidance_and_steps_and_prompts():
    own = {
        "composer": "fixed",
        "fixed_prompt": "a face, {class_name}",
        "policy": False,
        "guidance_scale": 9.0,
        "steps": 10,
    }
    (unit,) = planned(feedback(classes=short(fear=2)), frames(neutral=1), True, **own)
    assert not unit.expressions and not unit.policy and unit.steps == 10
    assert {(row.prompt, row.guidance_scale, row.guidance) for row in unit.rows} == {("a face, fear", 9.0, None)}
    assert {row.prompt_by for row in unit.rows} == {None}


def test_a_curve_of_guidance_is_passed_on():
    (unit,) = planned(feedback(classes=short(fear=1)), frames(neutral=1), guidance={"a": 3.0}, resampling=2, frames=8)
    assert unit.rows[0].guidance == GuidanceCurve(a=3.0) and (unit.resampling, unit.frames) == (2, 8)


def test_a_budget_holds_for_each_class():
    asked = feedback(marginal("s1", "fear"), marginal("s2", "fear"), classes=short(sad=9), images_per_sample=3)
    found = rows(planned(asked, frames(neutral=2), agent={"max_per_class": 4}))
    assert Counter(row.class_name for row in found) == {"fear": 4, "sad": 4}
    assert Counter(row.source_id for row in found if row.class_name == "fear") == {"s1": 2, "s2": 2}


@pytest.mark.parametrize(
    ("asked", "error", "told"),
    [
        (feedback(marginal("s", "boredom")), UnknownClass, "agent.expressions.aliases"),
        (feedback(marginal("s", "fear", pixels="AAAA")), InvalidRequest, "send no pixels"),
        (feedback(marginal("s", "fear"), marginal("s", "fear")), InvalidRequest, "twice"),
        (feedback(marginal("class:x", "fear")), InvalidRequest, "must not begin"),
        (feedback(classes=short(fear=101)), InvalidRequest, "max_images is 100"),
    ],
)
def test_wrong_feedback_is_refused(asked: Feedback, error: type[Exception], told: str):
    with pytest.raises(error, match=told):
        planned(asked, frames(neutral=1), agent={"max_images": 100})


def test_fixed_prompts_know_any_class():
    assert planned(feedback(marginal("s", "boredom")), frames(neutral=1), composer="fixed")
