"""The dataset contract: both layouts, stable ids and labels, every bad file and every mistake by name."""

from __future__ import annotations

import hashlib
import json
import logging
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from protocol import codec
from protocol.dataset import BadFileReport, Dataset, DatasetConfig, sample_id
from protocol.errors import BadFile, DatasetError, UnknownSource


def picture(value: int) -> np.ndarray:
    return np.full((3, 4, 3), value, np.uint8)


def save(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(codec.image_to_bytes(picture(value)))


def folders(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        save(root / name, number)
    return root


def metadata(folder: Path, *rows: dict | str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        if isinstance(row, dict) and isinstance(row.get("file_name"), str) and ".." not in row["file_name"]:
            save(folder / row["file_name"].lstrip("/"), 1)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def opened(root: Path, **options) -> Dataset:
    return Dataset.open(DatasetConfig(root=root, **options))


# ---------------------------------------------------------------- what is read


def test_class_folders(tmp_path: Path) -> None:
    folders(tmp_path, "dog/b.png", "cat/z.png", "dog/a.png", "cat/deep/y.png", ".cache/x.png", "cat/.hidden.png")
    data = opened(tmp_path)
    assert data.classes == ("cat", "dog")
    assert [(e.relative, e.label, e.class_name, e.caption) for e in data.samples] == [
        ("cat/deep/y.png", 0, "cat", None),
        ("cat/z.png", 0, "cat", None),
        ("dog/a.png", 1, "dog", None),
        ("dog/b.png", 1, "dog", None),
    ]
    assert len(data) == 4 and data.bad_files == ()
    assert (data.image(3) == picture(0)).all() and (data.image(data.samples[0].id) == picture(3)).all()
    entry = data.samples[1]
    assert entry.path == tmp_path / "cat" / "z.png"
    assert data.by_id(entry.id) is entry and entry.id in data and "nobody" not in data


def test_ids_are_hashes_of_the_relative_path_alone(tmp_path: Path) -> None:
    folders(tmp_path / "one", "train/cat/a.png", "train/dog/a.png")
    folders(tmp_path / "two", "train/ape/0.png", "train/cat/0.png", "train/cat/a.png", "train/dog/a.png")
    one, two = opened(tmp_path / "one", split="train"), opened(tmp_path / "two", split="train")
    expected = hashlib.sha256(b"train/cat/a.png").hexdigest()[:32]
    assert one.samples[0].id == two.samples[2].id == expected == sample_id("train/cat/a.png")
    assert len({entry.id for entry in two.samples}) == 4


def test_names_read_the_same_however_the_file_system_composes_them(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "café/é.png") for form in ("NFC", "NFD"))
    one, two = folders(tmp_path / "one", composed, "b/x.png"), folders(tmp_path / "two", decomposed, "b/x.png")
    read = [[(e.id, e.relative, e.class_name) for e in opened(root).samples] for root in (one, two)]
    assert read[0] == read[1]
    assert (opened(two).image(sample_id(composed)) == picture(0)).all()


def test_labels_agree_between_splits(tmp_path: Path) -> None:
    folders(tmp_path, "train/b/1.png", "train/c/1.png", "test/b/1.png", "test/c/1.png", "other/a/1.png")
    train, test = opened(tmp_path, split="train"), opened(tmp_path, split="test")
    assert train.classes == test.classes == ("b", "c")
    save(tmp_path / "val" / "a" / "1.png")
    with pytest.raises(DatasetError, match="no images of class 'a'"):
        opened(tmp_path, split="train")


def test_metadata_with_names_and_captions(tmp_path: Path) -> None:
    metadata(
        tmp_path,
        {"file_name": "images/2.png", "label": "dog", "text": "a dog"},
        {"file_name": "./images/1.png", "label": "cat", "caption": "a cat", "license": "ignored"},
        "",
        {"file_name": "3.png", "label": "cat"},
    )
    data = opened(tmp_path)
    assert [(e.relative, e.label, e.caption) for e in data.samples] == [
        ("3.png", 0, None),
        ("images/1.png", 0, "a cat"),
        ("images/2.png", 1, "a dog"),
    ]


def test_metadata_with_ints_keeps_them_as_labels(tmp_path: Path) -> None:
    metadata(tmp_path / "train", *({"file_name": f"{n}.png", "label": n} for n in range(11)))
    metadata(tmp_path / "test", *({"file_name": f"{n}.png", "label": n} for n in range(11)))
    data = opened(tmp_path, split="test")
    assert data.classes == tuple(str(number) for number in range(11))
    assert {e.relative: e.label for e in data.samples}["test/10.png"] == 10
    named = opened(tmp_path, split="train", classes=[f"digit {n}" for n in range(11)])
    assert {e.relative: e.class_name for e in named.samples}["train/10.png"] == "digit 10"


def test_a_split_with_metadata_beside_one_with_folders(tmp_path: Path) -> None:
    metadata(tmp_path / "train", {"file_name": "1.png", "label": "b"}, {"file_name": "2.png", "label": "a"})
    folders(tmp_path, "test/a/1.png", "test/b/1.png")
    assert [e.label for e in opened(tmp_path, split="train").samples] == [1, 0]
    assert [e.label for e in opened(tmp_path, split="test").samples] == [0, 1]


# ---------------------------------------------------------------- bad files


def test_bad_files_are_skipped_and_reported_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folders(tmp_path, "a/1.png", "b/1.png")
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    (tmp_path / "a" / "cut.png").write_bytes(codec.image_to_bytes(noise)[:-1000])
    (tmp_path / "b" / "notes.txt").write_text("not a picture")
    with caplog.at_level(logging.WARNING):
        data = opened(tmp_path)
    assert [e.relative for e in data.samples] == ["a/1.png", "b/1.png"]
    assert [report.path for report in data.bad_files] == [tmp_path / "a" / "cut.png", tmp_path / "b" / "notes.txt"]
    assert isinstance(data.bad_files[0], BadFileReport)
    assert "truncated" in data.bad_files[0].reason and "not an image" in data.bad_files[1].reason
    assert "cut.png" in caplog.text and "notes.txt" in caplog.text


def test_bad_files_are_fatal_when_asked(tmp_path: Path) -> None:
    folders(tmp_path, "a/1.png", "b/1.png")
    for name in ("x.png", "y.png"):
        (tmp_path / "a" / name).write_bytes(b"")
    with pytest.raises(BadFile, match=r"x\.png: .*\(and 1 more bad files\).*on_bad_file"):
        opened(tmp_path, on_bad_file="fail")


def test_a_listed_file_that_is_missing_or_too_large_is_a_bad_file(tmp_path: Path) -> None:
    metadata(tmp_path, *({"file_name": f"{n}.png", "label": label} for n, label in enumerate("aab")))
    (tmp_path / "0.png").unlink()
    assert [report.reason for report in opened(tmp_path).bad_files] == ["cannot be read: No such file or directory"]
    save(tmp_path / "0.png")
    (tmp_path / "0.png").write_bytes(codec.image_to_bytes(np.zeros((5, 5, 3), np.uint8)))
    assert "5 x 5 pixels; 20 are allowed" in opened(tmp_path, max_pixels=20).bad_files[0].reason


def test_a_file_that_goes_bad_later_is_named(tmp_path: Path) -> None:
    data = opened(folders(tmp_path, "a/1.png", "b/1.png"))
    (tmp_path / "a" / "1.png").write_bytes(b"overwritten")
    (tmp_path / "b" / "1.png").unlink()
    for index, name in enumerate(("a", "b")):
        with pytest.raises(BadFile, match=rf"{name}/1\.png cannot be read any more"):
            data.image(index)
    with pytest.raises(UnknownSource, match="mount the same dataset"):
        data.image("nobody")


# ---------------------------------------------------------------- mistakes


def test_folders_that_are_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"nowhere does not exist"):
        opened(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match="has no images"):
        opened(tmp_path)
    folders(tmp_path, "train/a/1.png")
    with pytest.raises(DatasetError, match=r"holds splits \(train\).*set `split`"):
        opened(tmp_path)
    with pytest.raises(DatasetError, match=r"no split 'test' \(it has train\)"):
        opened(tmp_path, split="test")
    with pytest.raises(DatasetError, match=r"one class only \(a\)"):
        opened(tmp_path, split="train")
    (tmp_path / "train" / "empty").mkdir()
    with pytest.raises(DatasetError, match="no images of class 'empty'"):
        opened(tmp_path, split="train")


def test_a_class_whose_every_file_is_bad_is_empty(tmp_path: Path) -> None:
    folders(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "b" / "1.png").write_bytes(b"")
    with pytest.raises(DatasetError, match="no images of class 'b'"):
        opened(tmp_path)


GOOD = [{"file_name": "1.png", "label": "a"}, {"file_name": "2.png", "label": "b"}]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{oops", r"metadata\.jsonl, line 3: not valid JSON"),
        ("[1]", "line 3: not a JSON object"),
        ({"label": "a"}, "line 3: `file_name` must be"),
        ({"file_name": 3, "label": "a"}, "line 3: `file_name` must be"),
        ({"file_name": "3.png"}, "line 3: `label` must be .* is None"),
        ({"file_name": "3.png", "label": True}, "line 3: `label` must be"),
        ({"file_name": "3.png", "label": 1.5}, "line 3: `label` must be"),
        ({"file_name": "3.png", "label": "a", "text": ["a"]}, "line 3: the caption must be a text"),
        ({"file_name": "sub/../1.png", "label": "a"}, r"line 3: 1\.png is listed before, on line 1"),
        ({"file_name": "../3.png", "label": "a"}, "line 3: .* leads out of the dataset folder"),
        ({"file_name": "x/../../3.png", "label": "a"}, "line 3: .* leads out of the dataset folder"),
        ({"file_name": "/etc/3.png", "label": "a"}, "line 3: .* leads out of the dataset folder"),
        ({"file_name": "3.png", "label": 0}, "some labels are ints and some are names"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, row: dict | str, said: str) -> None:
    metadata(tmp_path, *GOOD, row)
    with pytest.raises(DatasetError, match=said):
        opened(tmp_path)


@pytest.mark.parametrize("label", ["c", 2, -1])
def test_a_label_outside_the_classes_is_named(tmp_path: Path, label: int | str) -> None:
    metadata(tmp_path, *GOOD, {"file_name": "3.png", "label": label})
    with pytest.raises(DatasetError, match=rf"line 3: label {label!r} is outside the 2 classes \(a, b\)"):
        opened(tmp_path, classes=["a", "b"])


def test_a_negative_or_skipped_int_label_is_named(tmp_path: Path) -> None:
    metadata(tmp_path / "x", {"file_name": "1.png", "label": 0}, {"file_name": "2.png", "label": -1})
    with pytest.raises(DatasetError, match="line 2: label -1 is outside"):
        opened(tmp_path / "x")
    metadata(tmp_path / "y", {"file_name": "1.png", "label": 0}, {"file_name": "2.png", "label": 2})
    with pytest.raises(DatasetError, match="no images of class '1'"):
        opened(tmp_path / "y")


# ---------------------------------------------------------------- links that lead out


def outside(tmp_path: Path) -> Path:
    """A picture beside the dataset."""
    save(tmp_path / "elsewhere" / "secret.png", 9)
    return tmp_path / "elsewhere" / "secret.png"


def linked(tmp_path: Path, how: str) -> Path:
    """A dataset of two good pictures in each class, and one more that is outside."""
    secret = outside(tmp_path)
    root = folders(tmp_path / "data", "cat/a.png", "cat/b.png", "dog/a.png", "dog/b.png")
    if how == "file":
        (root / "cat" / "c.png").symlink_to(secret)
    elif how == "folder":
        (root / "owl").symlink_to(secret.parent)
    elif how == "metadata":
        (root / "cat" / "c.png").symlink_to(secret)
        metadata(
            root, *({"file_name": f"{name}/{file}.png", "label": name} for name in ("cat", "dog") for file in "ab")
        )
        with (root / "metadata.jsonl").open("a") as lines:
            lines.write('{"file_name": "cat/c.png", "label": "cat"}\n')
    return root


@pytest.mark.parametrize("how", ["file", "metadata"])
def test_a_link_that_leads_out_is_a_bad_file(tmp_path: Path, how: str) -> None:
    root = linked(tmp_path, how)
    data = opened(root)
    assert len(data) == 4
    [bad] = data.bad_files
    assert bad.path == root / "cat" / "c.png" and "leads out of the dataset" in bad.reason
    with pytest.raises(BadFile, match=r"leads out of the dataset, to .*secret\.png: .*links_to"):
        opened(root, on_bad_file="fail")
    assert len(opened(root, links_to=[tmp_path / "elsewhere"])) == 5


def test_a_class_folder_that_leads_out_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no images of class 'owl'"):
        opened(linked(tmp_path, "folder"))


def test_a_picture_that_became_a_link_later_is_not_read(tmp_path: Path) -> None:
    root = folders(tmp_path / "data", "cat/a.png", "dog/a.png")
    data = opened(root)
    (root / "cat" / "a.png").unlink()
    (root / "cat" / "a.png").symlink_to(outside(tmp_path))
    with pytest.raises(BadFile, match="leads out of the dataset"):
        data.image(0)


def test_links_within_the_dataset_and_to_its_root_are_fine(tmp_path: Path) -> None:
    root = folders(tmp_path / "data", "cat/a.png", "dog/a.png")
    (root / "cat" / "b.png").symlink_to(root / "dog" / "a.png")
    (tmp_path / "also").symlink_to(root)
    assert len(opened(tmp_path / "also")) == 3
