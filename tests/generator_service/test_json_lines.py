from __future__ import annotations

from pathlib import Path

import pytest

from generator_service import json_lines
from protocol.errors import DiskFull


def test_what_is_appended_is_read_in_order_and_to_the_bit(tmp_path: Path):
    path = tmp_path / "new" / "found.jsonl"
    assert json_lines.read(path) == []
    json_lines.append(path, [])
    assert not path.exists()
    json_lines.append(path, [[1, 0.1 + 0.2]])
    json_lines.append(path, ["two\nlines", None])
    assert json_lines.read(path) == [[1, 0.1 + 0.2], "two\nlines", None]


def test_a_line_that_was_cut_off_costs_itself_alone(tmp_path: Path):
    path = tmp_path / "found.jsonl"
    json_lines.append(path, ["first", "cut off here"])
    path.write_bytes(path.read_bytes()[:-6])
    json_lines.append(path, ["after"])
    assert json_lines.read(path) == ["first", "after"]


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json_lines.os, "fsync", full)
    with pytest.raises(DiskFull, match="found"):
        json_lines.append(tmp_path / "found.jsonl", [1])
