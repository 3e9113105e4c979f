from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from protocol.errors import CheckpointCorrupt, DiskFull
from tests.trainer.test_durable import FULL, needs_full_device
from trainer import checkpoint


def test_the_newest_is_found_and_two_are_kept(tmp_path: Path):
    assert checkpoint.load(tmp_path) is None
    for updates in (1, 2, 3):
        checkpoint.save(tmp_path, {"updates": updates, "w": torch.tensor([float(updates)])}, updates=updates)
    state = checkpoint.load(tmp_path)
    assert state is not None
    assert state["updates"] == 3
    assert state["w"].tolist() == [3.0]
    assert len(list(tmp_path.glob("*.pt"))) == 2


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest", "list"])
def test_damage_is_told(tmp_path: Path, damage: str):
    path = checkpoint.save(tmp_path, {"w": torch.zeros(4)}, updates=1)
    data = path.read_bytes()
    if damage == "flip":
        path.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    elif damage == "cut":
        path.write_bytes(data[:-1])
    elif damage == "remove":
        path.unlink()
    elif damage == "list":
        (tmp_path / checkpoint.MANIFEST).write_text("[]")
    else:
        (tmp_path / checkpoint.MANIFEST).write_text("{")
    with pytest.raises(CheckpointCorrupt, match="--fresh"):
        checkpoint.load(tmp_path)


def test_a_crash_before_the_manifest_leaves_the_earlier_checkpoint(tmp_path: Path):
    checkpoint.save(tmp_path, {"updates": 1}, updates=1)
    manifest = (tmp_path / checkpoint.MANIFEST).read_bytes()
    checkpoint.save(tmp_path, {"updates": 2}, updates=2)
    (tmp_path / checkpoint.MANIFEST).write_bytes(manifest)
    (tmp_path / "checkpoint-000000003.pt.partial").write_bytes(b"half")
    state = checkpoint.load(tmp_path)
    assert state is not None
    assert state["updates"] == 1


def test_a_crash_before_the_manifest_leaves_the_earlier_one_of_equal_updates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """An iteration's end saves again at the update where `checkpoint_every` just saved."""
    checkpoint.save(tmp_path, {"iteration": 1}, updates=4)
    write = checkpoint.write_durably

    def crash_at_manifest(path: Path, data: bytes) -> None:
        if path.name == checkpoint.MANIFEST:
            raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(checkpoint, "write_durably", crash_at_manifest)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, {"iteration": 2}, updates=4)
    assert checkpoint.load(tmp_path) == {"iteration": 1}


@needs_full_device
@pytest.mark.parametrize("part", ["tensors", "manifest"])
def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path: Path, part: str):
    checkpoint.save(tmp_path / "run", {"updates": 1}, updates=1)
    name = checkpoint.save(tmp_path / "other", {"updates": 2}, updates=2).name  # the same state has the same name
    partial = tmp_path / "run" / f"{name if part == 'tensors' else checkpoint.MANIFEST}.partial"
    partial.symlink_to(FULL)
    with pytest.raises(DiskFull):
        checkpoint.save(tmp_path / "run", {"updates": 2}, updates=2)
    assert checkpoint.load(tmp_path / "run") == {"updates": 1}
    checkpoint.save(tmp_path / "run", {"updates": 2}, updates=2)
    assert checkpoint.load(tmp_path / "run") == {"updates": 2}


def test_every_generator_goes_on_where_it_was(tmp_path: Path):
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    np.random.standard_normal()  # leaves a cached second normal
    checkpoint.save(tmp_path, {"rng": checkpoint.rng_state()}, updates=0)

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.standard_normal()), float(torch.rand(()))

    expected = [draw() for _ in range(3)]
    state = checkpoint.load(tmp_path)
    assert state is not None
    checkpoint.load_rng_state(state["rng"])
    assert [draw() for _ in range(3)] == expected
