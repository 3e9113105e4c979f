from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from generator_service.samples import CURRENT, SampleStore
from protocol.entries import Sample
from protocol.errors import DiskFull, UnknownSample
from protocol.messages import WeightsRef
from tests.protocol.test_entries import SAMPLES


def sample(number: int, **fields) -> Sample:
    values = {
        "id": f"s{number}",
        "run": None,
        "feedback": None,
        "model_version": None,
        "source_id": None,
        "index": 0,
        "seed": number,
        "label": 0,
        "class_name": "a",
        "prompt": "a",
        "guidance_scale": 1.0,
        "steps": 4,
        "scheduler": "ddim",
        "strength": 1.0,
        "weights": WeightsRef(name="base", version=1, digest="d"),
        "created": 0.0,
    }
    return Sample(**(values | fields))


def test_provenance_is_found_again_also_after_a_restart(tmp_path: Path):
    store = SampleStore(tmp_path, 100, 1000)
    store.add([sample(1), sample(2, class_name="ä")])
    store.add([sample(3)])
    for opened in (store, SampleStore(tmp_path, 100, 1000)):
        assert [opened.get(f"s{n}").seed for n in (1, 2, 3)] == [1, 2, 3]
        assert opened.get("s2").class_name == "ä"


@settings(max_examples=25)
@given(st.lists(SAMPLES, max_size=4, unique_by=lambda sample: sample.id))
def test_everything_that_a_sample_says_is_found_again(samples: list[Sample]):
    with tempfile.TemporaryDirectory() as folder:
        SampleStore(Path(folder), 100, 1000).add(samples)
        store = SampleStore(Path(folder), 100, 1000)
        assert [store.get(sample.id) for sample in samples] == samples


def test_a_sample_made_again_replaces_its_entry(tmp_path: Path):
    store = SampleStore(tmp_path, 100, 1000)
    store.add([sample(1)])
    store.add([sample(1, created=5.0)])
    assert store.get("s1").created == 5.0
    assert SampleStore(tmp_path, 100, 1000).get("s1").created == 5.0


def test_provenance_is_bounded_and_the_oldest_goes_first(tmp_path: Path):
    store = SampleStore(tmp_path, 10, 1000)
    for number in range(23):
        store.add([sample(number)])
        assert store.get(f"s{number}").seed == number
    kept = [number for number in range(23) if _has(store, number)]
    assert kept == list(range(15, 23))
    assert sum(len(path.read_text().splitlines()) for path in tmp_path.glob("*.jsonl")) == len(kept)
    assert [number for number in range(23) if _has(SampleStore(tmp_path, 10, 1000), number)] == kept


def _has(store: SampleStore, number: int) -> bool:
    try:
        return store.get(f"s{number}").seed == number
    except UnknownSample:
        return False


def test_a_line_cut_short_by_a_crash_is_dropped_and_writing_goes_on(tmp_path: Path):
    store = SampleStore(tmp_path, 100, 1000)
    store.add([sample(1), sample(2)])
    path = tmp_path / "samples.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    again = SampleStore(tmp_path, 100, 1000)
    again.add([sample(3)])
    assert [_has(again, number) for number in (1, 2, 3)] == [True, False, True]


def test_images_are_bounded_by_size_and_the_least_recently_used_go(tmp_path: Path):
    store = SampleStore(tmp_path, 100, 30)
    for name in ("a", "b", "c"):
        store.add_image(name, name.encode() * 10, "png")
    assert store.image("a") == (b"a" * 10, "image/png")
    store.add_image("d", b"d" * 10, "jpeg")
    with pytest.raises(UnknownSample):
        store.image("b")
    assert [store.image(name)[1] for name in ("a", "c", "d")] == ["image/png", "image/png", "image/jpeg"]
    assert sum(path.stat().st_size for path in (tmp_path / "images").iterdir()) == 30
    assert SampleStore(tmp_path, 100, 30).image("c")[0] == b"c" * 10


def test_images_and_clips_share_the_room_and_are_told_apart(tmp_path: Path):
    store = SampleStore(tmp_path, 100, 30)
    for kind, name, form in (("clip", "a", "webp"), ("image", "b", "webp"), ("clip", "c", "mp4")):
        (store.add_clip if kind == "clip" else store.add_image)(name, name.encode() * 10, form)
    for opened in (store, SampleStore(tmp_path, 100, 30)):
        assert opened.clip("a") == (b"a" * 10, "image/webp")
        assert opened.image("b") == (b"b" * 10, "image/webp")
        assert opened.clip("c") == (b"c" * 10, "video/mp4")
        for wrong, name in ((opened.image, "a"), (opened.clip, "b"), (opened.image, "c"), (opened.clip, "../clips/a")):
            with pytest.raises(UnknownSample):
                wrong(name)
    store.add_clip("d", b"d" * 15, "gif")
    assert store.clip("d") == (b"d" * 15, "image/gif")
    assert [path.name for path in (tmp_path / "clips").iterdir() if path.name != "d.gif"] == ["c.mp4"]
    assert list((tmp_path / "images").iterdir()) == []


@pytest.mark.parametrize("name", ["nope", "../samples.jsonl", ""])
def test_unknown_samples_say_so(tmp_path: Path, name: str):
    store = SampleStore(tmp_path, 100, 30)
    with pytest.raises(UnknownSample):
        store.get(name)
    with pytest.raises(UnknownSample):
        store.image(name)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no program `mount` here")
    if mounted.returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_records_none_of_the_samples_and_spoils_nothing(small_disk: Path):
    store = SampleStore(small_disk, 1000, 10**6)
    store.add([sample(0)])
    many = [sample(number) for number in range(1, 200)]
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * 40_000)
    before = (small_disk / CURRENT).read_bytes()
    for _ in range(2):
        with pytest.raises(DiskFull, match=r"samples\.jsonl.*generator\.max_samples"):
            store.add(many)
        assert (small_disk / CURRENT).read_bytes() == before
    with pytest.raises(UnknownSample):
        store.get("s1")
    with pytest.raises(DiskFull):
        store.add_image("s0", b"x" * 60_000, "png")
    with pytest.raises(UnknownSample):
        store.image("s0")
    filler.unlink()
    store.add(many[:50])
    for opened in (store, SampleStore(small_disk, 1000, 10**6)):
        assert [opened.get(f"s{n}").seed for n in (0, 1, 50)] == [0, 1, 50]
