from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from generator_service.backends.interface import WeightSet
from generator_service.weights import WeightStore, info
from protocol.errors import InvalidRequest, UnknownWeights, WeightsCorrupt
from protocol.messages import WeightsRef

CLASSES = ("a", "b")


@pytest.fixture
def base_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "model.safetensors").write_bytes(b"tensors")
    (folder / "model_index.json").write_bytes(b"{}")
    return folder


@pytest.fixture
def store(tmp_path: Path, base_folder: Path) -> WeightStore:
    return WeightStore(tmp_path / "weights", base_folder, "dit", CLASSES)


def publish(store: WeightStore, name: str, content: bytes = b"table") -> WeightSet:
    with store.staging() as folder:
        (folder / "table.safetensors").write_bytes(content)
        return store.publish(folder, name, store.base, "class_embedding", ("x", "y", "z"), {"steps": 3})


def test_the_base_digest_is_that_of_the_sorted_names_and_file_digests(store: WeightStore):
    lines = [
        f"{name}\0{hashlib.sha256(data).hexdigest()}\n"
        for name, data in (("model_index.json", b"{}"), ("transformer/model.safetensors", b"tensors"))
    ]
    assert store.base.ref == WeightsRef(
        name="base", version=1, digest=hashlib.sha256("".join(lines).encode()).hexdigest()
    )
    assert store.active() == store.base


def test_a_published_set_is_read_back_by_another_process(store: WeightStore, tmp_path: Path, base_folder: Path):
    made = publish(store, "digits")
    other = WeightStore(tmp_path / "weights", base_folder, "dit", CLASSES)
    found = other.resolve("digits")
    assert found == made
    assert (found.kind, found.classes, found.base, found.metadata) == (
        "class_embedding",
        ("x", "y", "z"),
        other.base,
        {"steps": 3},
    )
    other.verify(found)


def test_versions_count_up_and_a_bare_name_is_the_newest(store: WeightStore):
    for content in (b"1", b"2", b"3"):
        publish(store, "digits", content)
    assert [store.resolve(spec).ref.version for spec in ("digits", "digits@1", "digits@3")] == [3, 1, 3]
    assert len({store.resolve(f"digits@{version}").ref.digest for version in (1, 2, 3)}) == 3


def test_a_version_another_replica_took_meanwhile_is_passed_over(store: WeightStore, tmp_path: Path, base_folder: Path):
    other = WeightStore(tmp_path / "weights", base_folder, "dit", CLASSES)
    publish(store, "digits", b"first")
    fresh, stale = other._versions, [[]]  # its first listing is from before the other replica's rename
    other._versions = lambda name: stale.pop() if stale else fresh(name)
    assert publish(other, "digits", b"second").ref.version == 2
    assert (tmp_path / "weights" / "digits" / "1" / "table.safetensors").read_bytes() == b"first"


@pytest.mark.parametrize(
    "spec", ["nope", "digits@2", "digits@0", "digits@", "digits@x", "@1", "", "../base", "a" * 300, "d\0", "base@2"]
)
def test_unknown_weights_list_what_there_is(store: WeightStore, spec: str):
    publish(store, "digits")
    with pytest.raises(UnknownWeights, match="base@1, digits@1"):
        store.resolve(spec)


def test_the_active_choice_survives_a_restart(store: WeightStore, tmp_path: Path, base_folder: Path):
    first = publish(store, "digits")
    publish(store, "digits", b"newer")
    store.choose(first)
    other = WeightStore(tmp_path / "weights", base_folder, "dit", CLASSES)
    assert other.resolve(None) == first
    assert [entry.active for entry in other.list()] == [False, True, False]
    assert info(first, first.ref).base == "base@1"


def test_a_staging_folder_that_is_not_published_leaves_nothing(store: WeightStore, tmp_path: Path):
    with pytest.raises(RuntimeError), store.staging() as folder:
        (folder / "half").write_bytes(b"")
        raise RuntimeError
    assert list((tmp_path / "weights").iterdir()) == []


def test_the_base_name_is_taken(store: WeightStore):
    with pytest.raises(InvalidRequest, match="choose another name"):
        publish(store, "base")


# ---------------------------------------------------------------- corruption


def test_a_changed_tensor_file_is_named(store: WeightStore):
    made = publish(store, "digits")
    (made.folder / "table.safetensors").write_bytes(b"tablf")
    with pytest.raises(WeightsCorrupt, match=r"digits/1/table\.safetensors"):
        store.verify(made)


def test_a_missing_and_an_added_file_are_named(store: WeightStore):
    made = publish(store, "digits")
    (made.folder / "extra.bin").write_bytes(b"")
    with pytest.raises(WeightsCorrupt, match=r"extra\.bin"):
        store.verify(made)
    (made.folder / "extra.bin").unlink()
    (made.folder / "table.safetensors").unlink()
    with pytest.raises(WeightsCorrupt, match=r"table\.safetensors"):
        store.verify(made)


def test_a_manifest_changed_along_with_its_file_still_has_another_digest(store: WeightStore):
    made = publish(store, "digits")
    (made.folder / "table.safetensors").write_bytes(b"forged")
    manifest = json.loads((made.folder / "manifest.json").read_text())
    manifest["files"]["table.safetensors"] = hashlib.sha256(b"forged").hexdigest()
    (made.folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(WeightsCorrupt, match=r"manifest\.json"):
        store.verify(made)


def test_a_changed_base_is_found_under_the_set_that_sits_on_it(store: WeightStore, base_folder: Path):
    made = publish(store, "digits")
    (base_folder / "model_index.json").write_bytes(b"[]")
    with pytest.raises(WeightsCorrupt, match="base checkpoint"):
        store.verify(made)


@pytest.mark.parametrize("manifest", ["{", "{}"])
def test_an_unreadable_manifest_is_corrupt_not_a_crash(store: WeightStore, tmp_path: Path, manifest: str):
    folder = tmp_path / "weights" / "digits" / "1"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(manifest)
    with pytest.raises(WeightsCorrupt, match=r"manifest\.json"):
        store.resolve("digits")


def test_a_pinned_set_with_another_digest_is_refused(store: WeightStore):
    made = publish(store, "digits")
    assert store.pinned(made.ref) == made
    with pytest.raises(WeightsCorrupt, match="same weights folder"):
        store.pinned(made.ref.model_copy(update={"digest": "0" * 64}))


WRONG = ['{"digest": 5}', "[]", None]  # None: the file is gone


@pytest.mark.parametrize("manifest", WRONG)
def test_a_set_that_cannot_be_read_is_listed_with_its_problem(
    store: WeightStore, tmp_path: Path, base_folder: Path, manifest: str | None
):
    good = publish(store, "digits")
    path = publish(store, "letters").folder / "manifest.json"
    path.unlink()
    if manifest is not None:
        path.write_text(manifest)
    other = WeightStore(tmp_path / "weights", base_folder, "dit", CLASSES)
    listed = {str(entry): entry for entry in other.list()}
    assert listed.keys() == {"base@1", "digits@1", "letters@1"}
    assert listed["digits@1"] == info(good, other.active().ref)
    assert "manifest.json" in listed["letters@1"].problem and not listed["letters@1"].active
    assert other.find("letters", {"recipe": "one"}) is None


def test_a_set_is_refused_on_another_base_checkpoint(store: WeightStore, tmp_path: Path, base_folder: Path):
    made = publish(store, "digits")
    (base_folder / "transformer" / "model.safetensors").write_bytes(b"another")
    other = WeightStore(tmp_path / "weights", base_folder, "dit", CLASSES)
    with pytest.raises(WeightsCorrupt, match=r"digits@1 .* another checkpoint"):
        other.resolve("digits")
    assert "another checkpoint" in other.list()[1].problem

    path = made.folder / "manifest.json"  # as it was written before it told the base's digest
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "base_digest"}))
    assert other.resolve("digits").base == other.base


def test_a_set_whose_base_is_gone_is_listed_with_its_problem(store: WeightStore, tmp_path: Path, base_folder: Path):
    made = publish(store, "digits")
    manifest = json.loads((made.folder / "manifest.json").read_text())
    (made.folder / "manifest.json").write_text(json.dumps(manifest | {"base": "gone@3"}))
    other = WeightStore(tmp_path / "weights", base_folder, "dit", CLASSES)
    assert "gone@3" in other.list()[1].problem


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_who_may_read_published_weights_is_what_the_umask_says(store: WeightStore, umask: int):
    before = os.umask(umask)
    try:
        folder = publish(store, "digits").folder
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o777 & ~umask
    assert (folder / "table.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask
