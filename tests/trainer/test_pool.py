from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from protocol import codec
from protocol.entries import BlobRef, Sample, SampleBatch
from protocol.errors import CheckpointCorrupt
from protocol.messages import WeightsRef, sample_id
from trainer.pool import Pool, images

WEIGHTS = WeightsRef(name="w", version=1, digest="d")


def make_batch(feedback: int, unit: int, units: int, sources: list[str], m: int = 1) -> tuple[SampleBatch, bytes]:
    samples = [
        Sample(
            id=sample_id("r", feedback, source, index),
            run="r",
            feedback=feedback,
            model_version=0,
            source_id=source,
            index=index,
            seed=0,
            label=0,
            class_name="c",
            prompt="",
            guidance_scale=1.0,
            steps=1,
            scheduler="ddim",
            strength=1.0,
            weights=WEIGHTS,
            created=0.0,
        )
        for source in sources
        for index in range(m)
    ]
    pixels = np.stack([np.full((2, 2, 3), (feedback * 16 + unit * 4 + i) % 256, np.uint8) for i in range(len(samples))])
    batch = SampleBatch(
        unit_id=f"r.{feedback}.{unit}.x",
        run="r",
        feedback=feedback,
        unit=unit,
        units=units,
        model_version=0,
        weights=WEIGHTS,
        samples=samples,
        blob=None,
        worker="w",
        started=0.0,
        finished=1.0,
    )
    return batch, codec.encode({"images": pixels})


def test_a_sample_is_handed_out_once_in_order_whatever_order_it_came_in(tmp_path: Path):
    pool = Pool(tmp_path)
    for feedback, unit, sources in ((1, 1, ["d", "c"]), (0, 0, ["z"]), (1, 0, ["b", "a"])):
        assert pool.admit(*make_batch(feedback, unit, 2, sources, m=2))
    taken = pool.take(oldest=0)
    assert [candidate.order for candidate in taken] == sorted(
        [(0, "z", 0), (0, "z", 1)] + [(1, s, i) for s in "abcd" for i in (0, 1)]
    )
    assert pool.take(oldest=0) == []


def test_pixels_belong_to_their_samples(tmp_path: Path):
    pool = Pool(tmp_path)
    batch, data = make_batch(0, 0, 1, ["b", "a"])
    pool.admit(batch, data)
    first, second = images(pool.take(0))
    stored = codec.decode(data)["images"]
    assert (first == stored[1]).all()  # "a" comes first
    assert (second == stored[0]).all()


def test_the_same_unit_twice_is_admitted_once(tmp_path: Path):
    pool = Pool(tmp_path)
    assert pool.admit(*make_batch(0, 0, 1, ["a"]))
    assert not pool.admit(*make_batch(0, 0, 1, ["a"]))
    assert len(pool.take(0)) == 1
    assert not pool.admit(*make_batch(0, 0, 1, ["a"]))
    assert pool.take(0) == []


def test_complete_counts_failed_units(tmp_path: Path):
    pool = Pool(tmp_path)
    assert not pool.complete(0)
    pool.admit(*make_batch(0, 0, 2, ["a"]))
    assert not pool.complete(0)
    answer, _ = make_batch(0, 1, 2, ["b"])
    pool.admit(answer.model_copy(update={"samples": [], "error": {"detail": "no"}}), None)
    assert pool.complete(0)


def test_stale_samples_are_dropped_and_counted(tmp_path: Path):
    pool = Pool(tmp_path)
    pool.admit(*make_batch(0, 0, 1, ["a", "b"]))
    pool.admit(*make_batch(1, 0, 1, ["a"]))
    assert [candidate.sample.source_id for candidate in pool.drop_stale(oldest=1)] == ["a", "b"]
    assert [candidate.sample.feedback for candidate in pool.take(oldest=1)] == [1]
    assert pool.stale == 2
    pool.admit(*make_batch(0, 1, 2, ["late"]))
    assert pool.take(oldest=1) == []
    assert (pool.stale, pool.unused) == (2, 1)
    assert [candidate.sample.source_id for candidate in pool.drop_stale(oldest=1)] == ["late"]
    assert (pool.stale, pool.unused) == (3, 0)
    assert pool.drop_stale(oldest=1) == []


def test_the_answer_of_a_unit_that_was_tried_again_replaces_its_failure(tmp_path: Path):
    pool = Pool(tmp_path)
    batch, data = make_batch(0, 0, 1, ["a"])
    failed = batch.model_copy(update={"samples": [], "missing": ["a"], "error": {"detail": "no"}})
    assert pool.admit(failed, None)
    assert not pool.admit(failed, None)
    assert pool.take(0) == []
    assert pool.admit(batch, data)
    assert not pool.admit(failed, None)
    again = Pool(tmp_path)
    assert again.batches() == [batch]
    assert [candidate.sample.source_id for candidate in again.take(0)] == ["a"]
    assert images(pool.take(0))[0].shape == (2, 2, 3)


def test_a_replacement_that_a_kill_cut_short_is_the_failure_still(tmp_path: Path):
    pool = Pool(tmp_path)
    batch, data = make_batch(0, 0, 1, ["a"])
    pool.admit(batch.model_copy(update={"samples": [], "error": {"detail": "no"}}), None)
    (tmp_path / "000000-000000.safetensors").write_bytes(data)  # killed before the record was written
    again = Pool(tmp_path)
    assert again.complete(0)
    assert again.take(0) == []
    assert again.admit(batch, data)
    assert len(again.take(0)) == 1


def test_samples_that_are_stale_stay_so_after_a_restart(tmp_path: Path):
    pool = Pool(tmp_path)
    pool.admit(*make_batch(0, 0, 1, ["a"]))
    pool.admit(*make_batch(1, 0, 1, ["b"]))
    pool.drop_stale(1)
    again = Pool(tmp_path)
    again.load_state_dict(pool.state_dict())
    assert (again.stale, again.unused) == (1, 1)
    assert again.drop_stale(1) == []


def test_a_checkpoint_goes_back_and_files_survive(tmp_path: Path):
    pool = Pool(tmp_path)
    pool.admit(*make_batch(0, 0, 1, ["a"]))
    first = pool.take(0)
    state = pool.state_dict()
    pool.admit(*make_batch(1, 0, 1, ["b"]))
    pool.take(1)

    again = Pool(tmp_path)
    again.load_state_dict(state)
    assert [candidate.sample.source_id for candidate in again.take(0)] == ["b"]
    assert [c.sample.id for c in again.find([first[0].sample.id])] == [first[0].sample.id]


def test_a_batch_without_its_record_was_never_admitted(tmp_path: Path):
    pool = Pool(tmp_path)
    pool.admit(*make_batch(0, 0, 1, ["a"]))
    (tmp_path / "000000-000000.json").unlink()  # killed between the two writes
    again = Pool(tmp_path)
    assert again.take(0) == []
    assert again.admit(*make_batch(0, 0, 1, ["a"]))
    assert len(again.take(0)) == 1


@pytest.mark.parametrize("damage", ["flip", "remove", "record"])
def test_an_altered_file_is_not_trained_on(tmp_path: Path, damage: str):
    batch, data = make_batch(0, 0, 1, ["a"])
    ref = BlobRef(ref="redis:x", sha256=codec.digest(data), size=len(data))
    Pool(tmp_path).admit(batch.model_copy(update={"blob": ref}), data)
    file, record = tmp_path / "000000-000000.safetensors", tmp_path / "000000-000000.json"
    if damage == "flip":
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "remove":
        file.unlink()
    else:
        record.write_bytes(record.read_bytes()[:-9])
    with pytest.raises(CheckpointCorrupt, match="--fresh"):
        images(Pool(tmp_path).take(0))


class Staleness(RuleBasedStateMachine):
    """Batches arrive late, twice and in any order; iterations take; the run crashes and goes back to a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self._temporary = tempfile.TemporaryDirectory()
        self.folder = Path(self._temporary.name)
        self.pool = Pool(self.folder)
        self.k = 1
        self.iteration = 0
        self.sent: dict[tuple[int, int], int] = {}
        self.trained: dict[str, int] = {}
        self.saved = (self.pool.state_dict(), 0, dict(self.trained))

    def teardown(self) -> None:
        self._temporary.cleanup()

    @rule(feedback=st.integers(0, 5), unit=st.integers(0, 2), rows=st.integers(1, 3))
    def arrive(self, feedback: int, unit: int, rows: int) -> None:
        if feedback > self.iteration:
            return
        rows = self.sent.setdefault((feedback, unit), rows)
        self.pool.admit(*make_batch(feedback, unit, 3, [f"{unit}-{i}" for i in range(rows)]))

    @rule()
    def take(self) -> None:
        for candidate in self.pool.drop_stale(self.iteration - self.k):
            assert candidate.sample.id not in self.trained
        for candidate in self.pool.take(self.iteration - self.k):
            assert candidate.sample.feedback is not None
            assert self.iteration - candidate.sample.feedback <= self.k
            assert candidate.sample.id not in self.trained
            self.trained[candidate.sample.id] = self.iteration
        self.iteration += 1

    @rule()
    def save(self) -> None:
        self.saved = (self.pool.state_dict(), self.iteration, dict(self.trained))

    @rule()
    def crash(self) -> None:
        state, self.iteration, trained = self.saved
        self.trained = dict(trained)
        self.pool = Pool(self.folder)
        self.pool.load_state_dict(state)

    @invariant()
    def books_balance(self) -> None:
        arrived = sum(self.sent.values())
        assert arrived == len(self.trained) + self.pool.stale + self.pool.unused


Staleness.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestStaleness = Staleness.TestCase
