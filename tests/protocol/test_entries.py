"""What samples and work units say, of clips too, survives the way over the wire."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given
from pydantic import ValidationError

from protocol.entries import Sample, WorkRow, WorkUnit
from protocol.messages import WeightsRef
from protocol.video import GuidanceCurve

TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}", fullmatch=True)
SCALES = st.floats(0.0, 100.0)
SHAPES = st.floats(1.0, 20.0)
CURVES = st.builds(
    lambda pair, a, b, peak: GuidanceCurve(minimum=min(pair), maximum=max(pair), a=a, b=b, peak_normalised=peak),
    st.tuples(SCALES, SCALES),
    SHAPES,
    SHAPES,
    st.booleans(),
)
WEIGHTS = st.builds(WeightsRef, name=NAMES, version=st.integers(1, 10**6), digest=TEXT)
MADE = {  # what both a row of a unit and the sample that it becomes say
    "source_id": TEXT,
    "index": st.integers(0, 10**6),
    "seed": st.integers(0, 2**63 - 1),
    "label": st.integers(0, 1000),
    "class_name": TEXT,
    "prompt": TEXT,
    "negative_prompt": st.none() | TEXT,
    "guidance_scale": SCALES,
    "guidance": st.none() | CURVES,
    "init_id": st.none() | TEXT,
    "init_frame": st.none() | st.integers(0, 10**5),
    "action_units": st.lists(st.from_regex(r"AU[0-9]{2}", fullmatch=True), max_size=4),
    "prompt_by": st.none() | TEXT,
}
SHARED = {  # what both a unit and its samples say
    "steps": st.integers(1, 1000),
    "scheduler": st.sampled_from(["ddim", "euler", "unipc"]),
    "strength": st.floats(0.0, 1.0),
    "frames": st.none() | st.integers(2, 1024),
    "fps": st.none() | st.floats(0.0, 240.0, exclude_min=True),
    "resampling": st.integers(0, 20),
    "policy": st.booleans(),
    "weights": WEIGHTS,
}
SAMPLES = st.builds(
    Sample,
    id=NAMES,
    run=st.none() | NAMES,
    feedback=st.none() | st.integers(0, 1000),
    model_version=st.none() | st.integers(0, 1000),
    created=st.floats(0.0, 1e10),
    nearest_distance=st.none() | st.floats(0.0, 1.0),
    near_copy=st.booleans(),
    **MADE,
    **SHARED,
)
UNITS = st.builds(
    WorkUnit,
    id=TEXT,
    run=NAMES,
    feedback=st.integers(0, 1000),
    unit=st.integers(0, 100),
    units=st.integers(1, 100),
    model_version=st.integers(0, 1000),
    expressions=st.booleans(),
    rows=st.lists(st.builds(WorkRow, sample_id=NAMES, **MADE), max_size=3),
    **SHARED,
)


@given(SAMPLES)
def test_a_sample_comes_back_as_it_was(sample: Sample):
    assert Sample.model_validate_json(sample.model_dump_json()) == sample
    assert Sample.model_validate(sample.model_dump()) == sample


@given(UNITS)
def test_a_unit_comes_back_as_it_was(unit: WorkUnit):
    assert WorkUnit.model_validate_json(unit.model_dump_json()) == unit


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (WorkUnit, {"frames": 1}),
        (WorkUnit, {"frames": 1025}),
        (WorkUnit, {"fps": 0.0}),
        (WorkUnit, {"resampling": 21}),
        (WorkRow, {"init_frame": -1}),
        (WorkRow, {"guidance": {"minimum": 9.0, "maximum": 8.0}}),
        (WorkRow, {"guidance": {"a": 0.5}}),
    ],
    ids=str,
)
def test_what_no_clip_can_have_is_refused(kind: type[WorkUnit] | type[WorkRow], wrong: dict):
    (field,) = wrong
    with pytest.raises(ValidationError) as refused:
        kind.model_validate(wrong)
    assert any(error["loc"][0] == field and error["type"] != "missing" for error in refused.value.errors())
