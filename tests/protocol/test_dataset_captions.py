from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from protocol.dataset import Dataset, DatasetConfig
from protocol.dataset_captions import add_captions
from protocol.errors import DatasetError


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((2, 2, 3), dtype=np.uint8)).save(path)


def opened(root: Path, split: str | None = "train") -> Dataset:
    return Dataset.open(DatasetConfig(root=root, split=split))


@pytest.mark.parametrize("split", ["train", None])
def test_class_folders_keep_their_samples(tmp_path: Path, split: str | None):
    folder = tmp_path if split is None else tmp_path / split
    for name in ("kočka/1.png", "kočka/deep/2.png", "dog/1.png"):
        picture(folder / name)
    (folder / "dog" / "notes.png").write_text("no picture")
    before = opened(tmp_path, split)
    captions = {entry.relative: f"caption of {entry.relative}" for entry in before.samples[1:]}
    assert add_captions(tmp_path, split, captions | {"elsewhere.png": "x"}) == 2
    after = opened(tmp_path, split)
    assert after.digest() == before.digest() and after.classes == before.classes
    assert [entry.caption for entry in after.samples] == [None, *captions.values()]
    assert [bad.path for bad in after.bad_files] == [bad.path for bad in before.bad_files]
    assert not [path for path in folder.iterdir() if path.name.endswith(".partial")]


def test_what_a_user_wrote_stays_to_the_byte(tmp_path: Path):
    folder = tmp_path / "train"
    for name in "abcdef":
        picture(folder / f"{name}.png")
    lines = [
        b'{"label":"cat",   "file_name": "a.png", "caption": "mine", "photographer": "me"}',
        b"",
        b'{"file_name": "b.png", "label": "dog", "text": "mine too"}',
        b'{"file_name": "./c.png", "label": "dog", "weather": ["rain", 3], "caption": null}',
        b'{"file_name": "d.png", "label": "cat", "caption": " "}',
        b'{"file_name": "e.png", "label": "cat"}',
        b'{"file_name": "f.png", "label": "cat"}',
    ]
    path = folder / "metadata.jsonl"
    path.write_bytes(b"\n".join(lines))
    captions = {f"train/{name}.png": f"a “{name}”\nand more" for name in "abcde"} | {"train/f.png": "  "}
    assert add_captions(tmp_path, "train", captions) == 3
    written = path.read_bytes().splitlines()
    assert written[:2] == [lines[0], lines[2]] and written[5] == lines[6]
    assert json.loads(written[2]) == json.loads(lines[3]) | {"caption": "a “c”\nand more"}
    assert [entry.caption for entry in opened(tmp_path).samples] == [
        "mine",
        "mine too",
        "a “c”\nand more",
        "a “d”\nand more",
        "a “e”\nand more",
        None,
    ]


def test_nothing_new_writes_nothing(tmp_path: Path):
    picture(tmp_path / "cat" / "1.png")
    assert add_captions(tmp_path, None, {}) == 0
    assert not (tmp_path / "metadata.jsonl").exists()


def test_a_link_stays_one(tmp_path: Path):
    for name in ("cat", "dog"):
        picture(tmp_path / "data" / name / "1.png")
    real = tmp_path / "elsewhere.jsonl"
    rows = [{"file_name": f"{name}/1.png", "label": name} for name in ("cat", "dog")]
    real.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "data" / "metadata.jsonl").symlink_to(real)
    assert add_captions(tmp_path / "data", None, {"cat/1.png": "a cat"}) == 1
    assert (tmp_path / "data" / "metadata.jsonl").is_symlink()
    assert "a cat" in real.read_text()


def test_damage_is_told_and_nothing_changed(tmp_path: Path):
    picture(tmp_path / "cat" / "1.png")
    path = tmp_path / "metadata.jsonl"
    path.write_text('{"file_name": "cat/1.png", "label": "cat"}\n{"file_name"')
    with pytest.raises(DatasetError, match="line 2"):
        add_captions(tmp_path, None, {"cat/1.png": "a cat"})
    assert "a cat" not in path.read_text()


def test_names_that_no_metadata_can_hold_are_told(tmp_path: Path):
    picture(tmp_path / "cat" / "a\\b.png")
    with pytest.raises(DatasetError, match="leads out of"):
        add_captions(tmp_path, None, {"cat/a\\b.png": "a cat"})
    assert not (tmp_path / "metadata.jsonl").exists()


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    picture(tmp_path / "cat" / "1.png")

    def refuse(*about):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(DatasetError, match="writable"):
        add_captions(tmp_path, None, {"cat/1.png": "a cat"})
    assert [path.name for path in tmp_path.iterdir()] == ["cat"]
