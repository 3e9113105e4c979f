"""Queries and galleries: identities and cameras numbered alike, and every mistake by name."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from protocol.dataset import DatasetConfig
from protocol.errors import DatasetError
from tests.protocol.test_dataset_identity import CUHK, MARKET, picture, write
from trainer.data.retrieval_sets import RetrievalSet, open_retrieval
from trainer.metrics.retrieval import Labelled, retrieval


def split(root: Path, name: str, *rows: tuple[str, str, object]) -> None:
    """Pictures of (file, label, camera)."""
    for file, _, _ in rows:
        picture(root / name / file)
    body = [{"file_name": file, "label": label, "camera": camera} for file, label, camera in rows]
    (root / name / "metadata.jsonl").write_text("\n".join(map(json.dumps, body)))


def drawn(root: Path) -> DatasetConfig:
    """Characters by drawers; "b" of the queries has only a picture by its own drawer in the gallery."""
    split(root, "query", ("q0.png", "a", "ann"), ("q1.png", "b", "bob"))
    split(
        root, "gallery", ("g0.png", "c", "ann"), ("g1.png", "b", "bob"), ("g2.png", "a", "bob"), ("g3.png", "0000", 3)
    )
    return DatasetConfig(root=root)


def test_market(tmp_path: Path):
    config = DatasetConfig(root=write(tmp_path, MARKET), split="train", max_classes=2, max_per_class=1)
    query, gallery = open_retrieval(config, "query", "gallery")
    assert [e.class_name for e in query.dataset.samples] == ["0001", "0003"]
    assert query.identities.tolist() == [0, 1] and query.cameras.tolist() == [0, 2]  # cameras 1, 2, 6
    assert [e.class_name for e in gallery.dataset.samples] == ["0000", "0001", "0003"]
    assert gallery.identities.tolist() == [-1, 0, 1] and gallery.cameras.tolist() == [0, 1, 0]
    assert {t.dtype for t in (query.identities, query.cameras, gallery.identities)} == {torch.int64}
    same = open_retrieval(config, "query", "bounding_box_test")
    assert same[1].identities.equal(gallery.identities)


def test_cuhk03_np(tmp_path: Path):
    query, gallery = open_retrieval(DatasetConfig(root=write(tmp_path, CUHK), layout="cuhk03-np"), "query", "gallery")
    assert query.identities.tolist() == [0] and query.cameras.tolist() == [0]
    assert gallery.identities.tolist() == [0, 0] and gallery.cameras.tolist() == [1, 1]


def test_a_set_of_ones_own(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        query, gallery = open_retrieval(drawn(tmp_path), "query", "gallery")
    names = ["0000", "a", "b", "c"]  # 0000 is a name like others here
    assert [names[i] for i in query.identities] == ["a", "b"]
    assert [names[i] for i in gallery.identities] == ["c", "b", "a", "0000"]
    views = ["3", "ann", "bob"]
    assert [views[i] for i in query.cameras] == ["ann", "bob"]
    assert [views[i] for i in gallery.cameras] == ["ann", "bob", "bob", "3"]
    assert "1 of 2 queries have no match in 'gallery' and do not count, such as query/q1.png" in caplog.text


def labelled(found: RetrievalSet, features: list[list[float]]) -> Labelled:
    return Labelled(torch.tensor(features), found.identities, found.cameras)


def test_what_the_metric_makes_of_it(tmp_path: Path):
    config = drawn(tmp_path)
    there = [[0.9, 0.1], [0.0, 1.0], [1.0, 0.2], [0.5, 0.5]]
    asked = [[1.0, 0.0], [0.0, 1.0]]
    query, gallery = open_retrieval(config, "query", "gallery")
    with_exclusion = retrieval(labelled(query, asked), labelled(gallery, there))
    assert (with_exclusion.queries, with_exclusion.without_match) == (1, 1)
    assert with_exclusion.mean_average_precision == pytest.approx(1 / 2)  # g0 of "c" is nearer than g2 of "a"
    query, gallery = open_retrieval(config, "query", "gallery", camera_exclusion=False)
    assert query.cameras.tolist() == [-1, -1] and gallery.cameras.tolist() == [-1] * 4
    without = retrieval(labelled(query, asked), labelled(gallery, there))
    assert (without.queries, without.mean_average_precision) == (2, pytest.approx((1 / 2 + 1) / 2))


def test_one_split_against_itself_is_by_other_cameras_only(tmp_path: Path):
    split(tmp_path, "all", ("0.png", "a", 1), ("1.png", "a", 2), ("2.png", "b", 1), ("3.png", "b", 2))
    config = DatasetConfig(root=tmp_path)
    query, gallery = open_retrieval(config, "all", "all")
    assert query.identities.equal(gallery.identities) and query.cameras.equal(gallery.cameras)
    with pytest.raises(DatasetError, match="every query would find itself"):
        open_retrieval(config, "all", "all", camera_exclusion=False)


def test_identities_that_are_learnt_as_well(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    config = drawn(tmp_path / "drawn")
    split(tmp_path / "drawn", "train", ("0.png", "a", None), ("1.png", "z", None))
    with caplog.at_level(logging.WARNING):
        open_retrieval(config.model_copy(update={"split": "train"}), "query", "gallery")
    told = [record.message for record in caplog.records if "learnt as well" in record.message]
    assert told == ["1 of 4 identities to test on are learnt as well, such as a"]
    picture(write(tmp_path / "market", MARKET) / "bounding_box_train" / "0003_c1s1_000001_00.jpg")
    with pytest.raises(
        DatasetError, match="1 identities are both in 'train' and in the splits to test on, such as 0003"
    ):
        open_retrieval(DatasetConfig(root=tmp_path / "market", split="train"), "query", "gallery")


def test_identities_of_its_own_are_not_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        open_retrieval(DatasetConfig(root=write(tmp_path, MARKET), split="train"), "query", "gallery")
    assert not caplog.records


def test_a_split_that_is_missing(tmp_path: Path):
    config = drawn(tmp_path)
    with pytest.raises(DatasetError, match=r"no split 'probe' \(it has gallery, query\)"):
        open_retrieval(config, "probe", "gallery")
    write(tmp_path / "market", {name: MARKET[name] for name in ("bounding_box_train", "bounding_box_test")})
    with pytest.raises(DatasetError, match=r"no split 'query' \(it has train, gallery\)"):
        open_retrieval(DatasetConfig(root=tmp_path / "market"), "query", "gallery")


def test_a_picture_without_a_camera(tmp_path: Path):
    drawn(tmp_path)
    split(tmp_path, "query", ("q0.png", "a", "ann"), ("q1.png", "b", None))
    config = DatasetConfig(root=tmp_path)
    with pytest.raises(DatasetError, match=r"q1.png has no camera.*`camera`.*metadata.jsonl.*camera_exclusion = false"):
        open_retrieval(config, "query", "gallery")
    query, _ = open_retrieval(config, "query", "gallery", camera_exclusion=False)
    assert query.cameras.tolist() == [-1, -1]


def test_class_folders_are_searched_without_cameras(tmp_path: Path):
    for name in ("query/a/0.png", "gallery/a/1.png", "gallery/b/0.png"):
        picture(tmp_path / name)
    query, gallery = open_retrieval(DatasetConfig(root=tmp_path), "query", "gallery", camera_exclusion=False)
    assert query.identities.tolist() == [0] and gallery.identities.tolist() == [0, 1]


def test_no_query_has_a_match(tmp_path: Path):
    split(tmp_path, "query", ("0.png", "a", 1), ("1.png", "b", 1))
    split(tmp_path, "gallery", ("0.png", "a", 1), ("1.png", "c", 2))
    config = DatasetConfig(root=tmp_path)
    with pytest.raises(
        DatasetError, match=r"no picture of 'query' has one of the same identity by another camera in 'gal"
    ):
        open_retrieval(config, "query", "gallery")
    open_retrieval(config, "query", "gallery", camera_exclusion=False)
    split(tmp_path, "gallery", ("0.png", "d", 1), ("1.png", "c", 2))
    with pytest.raises(DatasetError, match=r"one of the same identity in 'gallery'"):
        open_retrieval(config, "query", "gallery", camera_exclusion=False)
