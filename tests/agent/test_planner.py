from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.planner import PlannerConfig, plan
from protocol.errors import InvalidRequest, UnknownClass, UnknownSource
from protocol.messages import ClassShortage, Feedback, MarginalSample, WeightsRef, sample_id, seed_of

WEIGHTS = WeightsRef(name="digits", version=2, digest="abc")
CLASSES = ("cat", "dog")


def marginal(name: str, class_name: str = "cat", **more) -> MarginalSample:
    return MarginalSample(sample_id=name, label=7, class_name=class_name, score=0.1, **more)


def feedback(*samples: MarginalSample, classes: tuple[ClassShortage, ...] = (), **more) -> Feedback:
    return Feedback(run="r", feedback=3, model_version=40, samples=list(samples), classes=list(classes), **more)


def planned(asked: Feedback, known=lambda name: True, classes=CLASSES, **config):
    return plan(asked, PlannerConfig(**config), WEIGHTS, classes, known)


def test_rows_carry_identity_seed_and_class():
    units = planned(feedback(marginal("a"), marginal("b", "dog")), images_per_sample=2, guidance_scale=3.0)
    rows = [row for unit in units for row in unit.rows]
    assert [(row.source_id, row.index, row.class_name, row.label) for row in rows] == [
        ("a", 0, "cat", 7),
        ("a", 1, "cat", 7),
        ("b", 0, "dog", 7),
        ("b", 1, "dog", 7),
    ]
    assert [row.sample_id for row in rows] == [sample_id("r", 3, row.source_id, row.index) for row in rows]
    assert [row.seed for row in rows] == [seed_of(row.sample_id) for row in rows]
    assert {row.init_id for row in rows[:2]} == {"a"}
    assert all(unit.weights == WEIGHTS and unit.model_version == 40 for unit in units)


def test_units_are_cut_to_size_and_numbered():
    asked = feedback(*(marginal(f"s{i}") for i in range(7)))
    units = planned(asked, images_per_sample=3, unit_size=8)
    assert [len(unit.rows) for unit in units] == [8, 8, 5]
    assert [(unit.unit, unit.units) for unit in units] == [(0, 3), (1, 3), (2, 3)]
    assert [unit.id for unit in units] == [f"r.3.{i}.{asked.fingerprint()}" for i in range(3)]
    assert units == planned(asked, images_per_sample=3, unit_size=8)


def test_another_question_has_other_unit_ids_but_the_same_seeds():
    one, other = feedback(marginal("a")), feedback(marginal("a"), marginal("b"))
    assert planned(one)[0].id != planned(other)[0].id
    assert planned(one)[0].rows[0].seed == planned(other)[0].rows[0].seed


def test_feedback_overrides_images_per_sample():
    assert len(planned(feedback(marginal("a"), images_per_sample=4), images_per_sample=1)[0].rows) == 4


def test_shortage_is_made_from_noise_in_units_of_its_own():
    shortage = ClassShortage(label=1, class_name="dog", images=3)
    first, second = planned(feedback(marginal("a"), classes=(shortage,)), images_per_sample=2, strength=0.5)
    assert (first.strength, second.strength) == (0.5, 1.0)
    assert [(row.source_id, row.init_id) for row in second.rows] == [("class:dog", None)] * 3


def test_without_init_everything_is_from_noise():
    units = planned(feedback(marginal("a")), init=False, known=lambda name: False, strength=0.5)
    assert units[0].strength == 1.0
    assert units[0].rows[0].init_id is None


def test_pixels_stand_in_for_an_unknown_sample():
    units = planned(feedback(marginal("a", pixels="AAAA")), known=lambda name: False, strength=0.5)
    assert units[0].rows[0].init_id is None
    assert units[0].strength == 0.5


@pytest.mark.parametrize(
    ("caption", "prompt"), [(None, "a photo of cat"), ("asleep {x}", "a photo of cat, which is asleep {x}")]
)
def test_prompt(caption, prompt):
    assert planned(feedback(marginal("a", caption=caption)))[0].rows[0].prompt == prompt


@given(counts=st.lists(st.integers(1, 6), min_size=1, max_size=6), m=st.integers(1, 5), budget=st.integers(1, 12))
def test_budget_is_spent_whole_and_evenly(counts, m, budget):
    names = [f"c{i}" for i in range(len(counts))]
    samples = [marginal(f"{name}-{j}", name) for name, count in zip(names, counts, strict=True) for j in range(count)]
    units = planned(feedback(*samples), classes=names, images_per_sample=m, max_per_class=budget)
    rows = [row for unit in units for row in unit.rows]
    by_class = Counter(row.class_name for row in rows)
    for name, count in zip(names, counts, strict=True):
        assert by_class[name] == min(budget, count * m)
        each = Counter(row.source_id for row in rows if row.class_name == name)
        shares = [each[f"{name}-{j}"] for j in range(count)]
        assert max(shares) - min(shares) <= 1


def test_errors_say_what_to_do():
    with pytest.raises(UnknownClass, match="onthefly adapt"):
        planned(feedback(marginal("a", "bird")))
    with pytest.raises(UnknownClass, match="cat, dog"):
        planned(feedback(classes=(ClassShortage(label=0, class_name="bird", images=1),)))
    with pytest.raises(UnknownSource, match="mount the same dataset"):
        planned(feedback(marginal("a")), known=lambda name: False)
    many = ClassShortage(label=0, class_name="cat", images=10**9)
    with pytest.raises(InvalidRequest, match=r"asks for 1000000006 images.*agent.max_images"):
        planned(feedback(marginal("a"), classes=(many,)), images_per_sample=6)
    with pytest.raises(InvalidRequest, match="must not begin with"):
        planned(feedback(marginal("class:cat", pixels="AAAA")))
    with pytest.raises(InvalidRequest, match="twice"):
        planned(feedback(marginal("a"), marginal("a")))


def test_text_weights_take_any_class():
    assert planned(feedback(marginal("a", "bird")), classes=())[0].rows[0].class_name == "bird"


def test_feedback_must_ask_for_something():
    with pytest.raises(ValueError, match="at least one"):
        feedback()


@pytest.mark.parametrize(
    ("reads_prompts", "perturb", "versions"),
    [(True, "template", 3), (True, "openai", 3), (True, "none", None), (False, "openai", None)],
)
def test_units_say_how_many_versions_their_captions_get(reads_prompts, perturb, versions):
    asked = feedback(marginal("a", caption="asleep"), classes=(ClassShortage(label=1, class_name="dog", images=9),))
    config = PlannerConfig(perturb=perturb, images_per_sample=3, unit_size=5)
    units = plan(asked, config, WEIGHTS, CLASSES, lambda name: True, reads_prompts=reads_prompts)
    assert [unit.versions for unit in units] == [versions] * 3
    rows = [row for unit in units for row in unit.rows]
    assert {(row.class_name, row.caption, row.prompt_by) for row in rows} == {
        ("cat", "asleep", None),
        ("dog", None, None),
    }


def test_a_captioned_prompt_has_a_place_for_the_caption():
    with pytest.raises(ValueError, match="caption"):
        PlannerConfig(captioned_prompt="a photo of {class_name}")
