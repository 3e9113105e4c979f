"""Market-1501, CUHK03-NP and CASIA-WebFace by their published layouts: whom each file shows, and by which camera."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from protocol.dataset import Dataset, DatasetConfig, sample_id
from protocol.dataset_captions import add_captions
from protocol.dataset_identity import Box, boxes
from protocol.errors import DatasetError

MARKET = {
    "bounding_box_train": ["0002_c1s1_000451_03.jpg", "0002_c2s1_000551_01.jpg", "0007_c3s3_077419_03.jpg"],
    "query": ["0001_c1s1_001051_00.jpg", "0003_c6s4_015641_00.jpg"],
    "bounding_box_test": [
        "-1_c1s1_000401_03.jpg",
        "0000_c1s1_000151_01.jpg",
        "0001_c2s1_001976_01.jpg",
        "0003_c1s6_015971_00.jpg",
    ],
}
CUHK = {
    "bounding_box_train": ["0001_c1_1.png", "0001_c2_6.png", "0003_c1_12.png"],
    "query": ["0002_c1_1.png"],
    "bounding_box_test": ["0002_c2_7.png", "0002_c2_10.png"],
}


def picture(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 4, 3), value, np.uint8)).save(path)


def write(root: Path, layout: dict[str, list[str]]) -> Path:
    for folder, names in layout.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number, name in enumerate(names):
            picture(root / folder / name, 10 * number)
        (root / folder / "Thumbs.db").write_bytes(b"as Market-1501 comes")
    return root


def opened(root: Path, **options) -> Dataset:
    return Dataset.open(DatasetConfig(root=root, **options))


def seen(data: Dataset) -> list[tuple]:
    return [(e.relative, e.label, e.class_name, e.camera) for e in data.samples]


# ---------------------------------------------------------------- Market-1501 and CUHK03-NP


@pytest.mark.parametrize("layout", ["auto", "market1501"])
@pytest.mark.parametrize("split", ["train", "bounding_box_train"])
def test_market_trains_on_the_identities_of_its_names(tmp_path: Path, layout: str, split: str):
    data = opened(write(tmp_path, MARKET), layout=layout, split=split, on_bad_file="fail")
    assert data.classes == ("0002", "0007")  # the last has one picture, which is fine
    assert seen(data) == [
        ("bounding_box_train/0002_c1s1_000451_03.jpg", 0, "0002", "1"),
        ("bounding_box_train/0002_c2s1_000551_01.jpg", 0, "0002", "2"),
        ("bounding_box_train/0007_c3s3_077419_03.jpg", 1, "0007", "3"),
    ]
    assert data.samples[0].id == sample_id("bounding_box_train/0002_c1s1_000451_03.jpg")
    assert data.samples[0].path == tmp_path / "bounding_box_train" / "0002_c1s1_000451_03.jpg"
    assert data.image(2).mean() == pytest.approx(20, abs=2)


def test_market_searches_in_identities_and_distractors_and_never_in_junk(tmp_path: Path):
    write(tmp_path, MARKET)
    query = Dataset.open_identities(DatasetConfig(root=tmp_path, split="query"))
    gallery = Dataset.open_identities(DatasetConfig(root=tmp_path, split="gallery", max_classes=2, max_per_class=1))
    assert [(e.class_name, e.camera) for e in query.samples] == [("0001", "1"), ("0003", "6")]
    assert gallery.classes == ("0000", "0001", "0003")
    assert seen(gallery) == [
        ("bounding_box_test/0000_c1s1_000151_01.jpg", 0, "0000", "1"),
        ("bounding_box_test/0001_c2s1_001976_01.jpg", 1, "0001", "2"),
        ("bounding_box_test/0003_c1s6_015971_00.jpg", 2, "0003", "1"),
    ]


@pytest.mark.parametrize("layout", ["auto", "cuhk03-np"])
def test_cuhk03_np(tmp_path: Path, layout: str):
    root = write(tmp_path / "CUHK03-NP" / "detected", CUHK)
    data = opened(root, layout=layout, split="train")
    assert seen(data) == [
        ("bounding_box_train/0001_c1_1.png", 0, "0001", "1"),
        ("bounding_box_train/0001_c2_6.png", 0, "0001", "2"),
        ("bounding_box_train/0003_c1_12.png", 1, "0003", "1"),
    ]
    gallery = Dataset.open_identities(DatasetConfig(root=root, split="bounding_box_test", layout=layout))
    assert [e.relative for e in gallery.samples] == [
        "bounding_box_test/0002_c2_10.png",
        "bounding_box_test/0002_c2_7.png",
    ]
    with pytest.raises(DatasetError, match=r"set `root` to .*CUHK03-NP/detected$"):
        opened(tmp_path / "CUHK03-NP", layout=layout, split="train")


def test_captions_are_written_beside_the_boxes_and_change_nothing_else(tmp_path: Path):
    before = opened(write(tmp_path, MARKET), split="train")
    assert add_captions(tmp_path, "train", {before.samples[1].relative: "a person in red"}) == 1
    assert (tmp_path / "bounding_box_train" / "metadata.jsonl").is_file()
    after = opened(tmp_path, split="train")
    assert after.digest() == before.digest() and seen(after) == seen(before)
    assert [e.caption for e in after.samples] == [None, "a person in red", None]


@pytest.mark.parametrize(
    "name",
    [
        "0002.jpg",
        "0002_1_000451_03.jpg",
        "2_c1s1_000451_03.jpg",
        "0002_c1s1_000451_03.txt",
        "readme.txt",
        "-2_c1_1.png",
    ],
)
def test_a_name_that_says_not_who_and_where_is_told(tmp_path: Path, name: str):
    (write(tmp_path, MARKET) / "bounding_box_train" / name).write_bytes(b"")
    with pytest.raises(DatasetError, match=rf"bounding_box_train/{name}: expected a name such as 0002_c1s1_000451_03"):
        opened(tmp_path, split="train")


@pytest.mark.parametrize("split", ["train", "query"])
def test_distractors_are_in_the_gallery_alone(tmp_path: Path, split: str):
    folder = {"train": "bounding_box_train", "query": "query"}[split]
    picture(write(tmp_path, MARKET) / folder / "0000_c1s1_000001_00.jpg")
    with pytest.raises(
        DatasetError, match=r"0000_c1s1_000001_00.jpg: identity 0000 .* which only bounding_box_test has"
    ):
        opened(tmp_path, split=split)


def test_splits_of_market_that_are_not_there(tmp_path: Path):
    write(tmp_path, {"bounding_box_train": MARKET["bounding_box_train"]})
    with pytest.raises(DatasetError, match=r"holds splits, not classes: set `split` to one of train$"):
        opened(tmp_path)
    for split in ("query", "test", "gt_bbox"):
        with pytest.raises(DatasetError, match=rf"no split '{split}' \(it has train\)"):
            opened(tmp_path, split=split)
    with pytest.raises(
        DatasetError, match=r"neither bounding_box_train nor bounding_box_test: set `root` to the folder"
    ):
        opened(tmp_path / "bounding_box_train", layout="market1501", split="train")


def test_a_folder_without_pictures_is_told(tmp_path: Path):
    (write(tmp_path, {"bounding_box_train": []}) / "query").mkdir()
    with pytest.raises(DatasetError, match=r"bounding_box_train has no images"):
        opened(tmp_path, split="train")
    with pytest.raises(DatasetError, match=r"query has no images"):
        Dataset.open_identities(DatasetConfig(root=tmp_path, split="query"))


def test_class_folders_stay_what_they_were_beside_a_query(tmp_path: Path):
    for name in ("train/query/0.png", "train/gallery/0.png", "query/0002/0.png"):
        picture(tmp_path / name)
    assert opened(tmp_path, split="train").classes == ("gallery", "query")
    assert Dataset.open_identities(DatasetConfig(root=tmp_path, split="query")).classes == ("0002",)


NUMBERS = st.integers(min_value=0, max_value=10**6)


@settings(deadline=None)  # the disk is shared
@given(identity=st.integers(1, 10**5), camera=st.integers(1, 99), sequence=st.none() | st.integers(1, 9), rest=NUMBERS)
def test_whatever_is_written_into_a_name_is_read(
    tmp_path_factory: pytest.TempPathFactory, identity: int, camera: int, sequence: int | None, rest: int
):
    folder = tmp_path_factory.mktemp("boxes")
    where = f"c{camera}" if sequence is None else f"c{camera}s{sequence}"
    path = folder / f"{identity:04d}_{where}_{rest}.jpg"
    path.touch()
    assert list(boxes(folder)) == [Box(path, f"{identity:04d}", str(camera))]


# ---------------------------------------------------------------- CASIA-WebFace


def test_webface_is_folders_of_digits(tmp_path: Path):
    for name in ("0000045/001.jpg", "0000045/002.jpg", "0000099/001.jpg"):
        picture(tmp_path / name)
    data = opened(tmp_path, layout="casia-webface")
    assert seen(data) == [
        ("0000045/001.jpg", 0, "0000045", None),
        ("0000045/002.jpg", 0, "0000045", None),
        ("0000099/001.jpg", 1, "0000099", None),
    ]
    assert data.digest() == opened(tmp_path).digest() == opened(tmp_path, layout="imagefolder").digest()
    picture(tmp_path / "Someone" / "001.jpg")
    with pytest.raises(DatasetError, match=r"Someone: expected folders named by digits such as 0000045.*imagefolder"):
        opened(tmp_path, layout="casia-webface")


def test_a_layout_that_nobody_knows(tmp_path: Path):
    with pytest.raises(ValidationError, match="layout"):
        DatasetConfig(root=tmp_path, layout="dukemtmc")


# ---------------------------------------------------------------- cameras of any dataset, and a part of the classes


def lines(folder: Path, *rows: dict) -> Path:
    for row in rows:
        picture(folder / row["file_name"])
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_metadata_may_say_cameras(tmp_path: Path):
    lines(
        tmp_path,
        {"file_name": "1.png", "label": "a", "camera": "front"},
        {"file_name": "2.png", "label": "a", "camera": 7},
        {"file_name": "3.png", "label": "b", "camera": None},
        {"file_name": "4.png", "label": "b"},
    )
    assert [e.camera for e in opened(tmp_path).samples] == ["front", "7", None, None]


@pytest.mark.parametrize("camera", ["", True, 1.5, ["front"]])
def test_a_camera_that_is_none_is_told(tmp_path: Path, camera: object):
    lines(tmp_path, {"file_name": "1.png", "label": "a"}, {"file_name": "2.png", "label": "b", "camera": camera})
    with pytest.raises(DatasetError, match=r"metadata.jsonl, line 2: `camera` must be a name or an int"):
        opened(tmp_path)


def test_cameras_are_no_part_of_what_the_data_are(tmp_path: Path):
    rows = [{"file_name": f"{n}.png", "label": "ab"[n % 2]} for n in range(4)]
    without = opened(lines(tmp_path / "without", *rows))
    cameras = opened(lines(tmp_path / "with", *({**row, "camera": 1} for row in rows)))
    assert without.digest() == cameras.digest() and [e.id for e in without.samples] == [e.id for e in cameras.samples]


def test_the_first_of_each_class_and_the_first_classes(tmp_path: Path):
    for name in ("a/1.png", "a/2.png", "a/3.png", "b/1.png", "c/1.png", "c/2.png"):
        picture(tmp_path / name)
    few = opened(tmp_path, max_per_class=2)
    assert [e.relative for e in few.samples] == ["a/1.png", "a/2.png", "b/1.png", "c/1.png", "c/2.png"]
    fewer = opened(tmp_path, max_classes=2, max_per_class=1)
    assert fewer.classes == ("a", "b") and [e.relative for e in fewer.samples] == ["a/1.png", "b/1.png"]
    assert opened(tmp_path, max_classes=9, max_per_class=9).digest() == opened(tmp_path).digest()
    for wrong in ({"max_classes": 1}, {"max_per_class": 0}):
        with pytest.raises(ValidationError):
            DatasetConfig(root=tmp_path, **wrong)


def test_the_first_classes_of_int_labels_and_of_two_splits(tmp_path: Path):
    rows = [{"file_name": f"{n}.png", "label": n % 4} for n in range(8)]
    lines(tmp_path / "train", *rows)
    lines(tmp_path / "test", *rows)
    train = opened(tmp_path, split="train", max_classes=3)
    test = opened(tmp_path, split="test", max_classes=3, classes=list(train.classes))
    assert train.classes == test.classes == ("0", "1", "2")
    assert [e.label for e in train.samples] == [e.label for e in test.samples] == [0, 1, 2, 0, 1, 2]


def test_identities_to_search_need_neither_two_nor_the_same_as_those_learnt(tmp_path: Path):
    lines(tmp_path / "query", {"file_name": "1.png", "label": 11, "camera": 1})
    data = Dataset.open_identities(DatasetConfig(root=tmp_path, split="query", classes=["x", "y"]))
    assert data.classes == ("11",) and seen(data) == [("query/1.png", 0, "11", "1")]
