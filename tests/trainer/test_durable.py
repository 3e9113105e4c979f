from __future__ import annotations

from pathlib import Path

import pytest

from protocol.errors import DiskFull
from trainer.durable import remove_partial, write_durably
from trainer.folder import held

FULL = Path("/dev/full")  # a file on a disk without room
needs_full_device = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


@needs_full_device
def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path):
    path = tmp_path / "a.json"
    write_durably(path, b"before")
    (tmp_path / "a.json.partial").symlink_to(FULL)
    with pytest.raises(DiskFull, match=r"no room left to write .*a\.json"):
        write_durably(path, b"after")
    assert path.read_bytes() == b"before"
    assert [found.name for found in tmp_path.iterdir()] == ["a.json"]
    write_durably(path, b"after")
    assert path.read_bytes() == b"after"


def test_who_takes_a_folder_removes_what_a_killed_writer_left(tmp_path: Path):
    for name in ("metrics.jsonl.partial", "checkpoints/checkpoint-1.pt.partial", "batches/0-0.json.partial"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"half")
    write_durably(tmp_path / "batches" / "0-0.json", b"whole")
    with held(tmp_path):
        assert list(tmp_path.rglob("*.partial")) == []
        assert (tmp_path / "batches" / "0-0.json").read_bytes() == b"whole"
    remove_partial(tmp_path)
