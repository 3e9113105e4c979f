"""Datasets of clips: class folders and metadata; DFEW, FERV39k and CK+ as they are published; bad clips by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from protocol import clips, codec
from protocol.dataset import Dataset, DatasetConfig, sample_id
from protocol.dataset_clips import EMOTIONS
from protocol.errors import BadFile, DatasetError, InvalidClip, UnknownSource


def clip_of(value: int, frames: int = 3) -> np.ndarray:
    """Frame m is of grey `value` + m."""
    return np.stack([np.full((4, 6, 3), value + index, np.uint8) for index in range(frames)])


def frames(path: Path, value: int = 0, count: int = 3) -> Path:
    """A folder of frames, numbered from 1 without zeros before."""
    path.mkdir(parents=True, exist_ok=True)
    for index, frame in enumerate(clip_of(value, count), start=1):
        (path / f"{index}.png").write_bytes(codec.image_to_bytes(frame))
    return path


def file(path: Path, value: int = 0, count: int = 3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(clips.to_bytes(clip_of(value, count), path.suffix[1:]))
    return path


def opened(root: Path, **options) -> Dataset:
    return Dataset.open(DatasetConfig(root=root, **({"layout": "clips"} | options)))


def shown(data: Dataset) -> list[tuple]:
    return [(e.relative, e.class_name, e.subject, e.frames) for e in data.samples]


# ---------------------------------------------------------------- class folders and metadata


def test_class_folders_of_clips(tmp_path: Path):
    frames(tmp_path / "happy" / "s1", 10, count=12)
    file(tmp_path / "happy" / "s2.webp", 20)
    file(tmp_path / "fear" / "s3.gif", 30, count=2)
    file(tmp_path / "fear" / "s4.mp4", 40, count=5)
    frames(tmp_path / "fear" / ".hidden")
    data = opened(tmp_path)
    assert shown(data) == [
        ("fear/s3.gif", "fear", None, 2),
        ("fear/s4.mp4", "fear", None, 5),
        ("happy/s1", "happy", None, 12),
        ("happy/s2.webp", "happy", None, 3),
    ]
    assert data.is_clips and all(entry.is_clip for entry in data.samples)
    entry = data.samples[2]
    assert entry.id == sample_id("happy/s1") and data.entry(entry.id) is data.entry(2) is entry
    assert (data.clip(2) == clip_of(10, 12)).all()
    assert (data.clip(entry.id, 4)[:, 0, 0, 0] == [11, 14, 17, 20]).all()
    assert (data.clip(2, [11, 0])[:, 0, 0, 0] == [21, 10]).all()
    assert (data.clip(0, 4)[:, 0, 0, 0] == [30, 30, 31, 31]).all()  # fewer than wanted: repeats
    assert (data.image(2) == clip_of(10)[0]).all() and (data.image(2, 9) == clip_of(19)[0]).all()
    assert data.subset([3, 2]).is_clips and (data.subset([3, 2]).clip(0) == clip_of(20)).all()


def test_frames_that_are_not_there_are_the_callers_mistake(tmp_path: Path):
    frames(tmp_path / "a" / "1")
    frames(tmp_path / "b" / "1")
    data = opened(tmp_path)
    for ask in (lambda: data.image(0, 3), lambda: data.clip(0, [0, -1]), lambda: data.clip(0, [3])):
        with pytest.raises(InvalidClip, match=r"has no frame .*: it has 3, counted from 0"):
            ask()
    with pytest.raises(UnknownSource):
        data.clip("nobody")


def test_pictures_are_no_clips(tmp_path: Path):
    for name in "ab":
        frames(tmp_path / name, 7, count=1)
    data = Dataset.open(DatasetConfig(root=tmp_path))
    assert not data.is_clips and not data.samples[0].is_clip
    assert (data.image(0) == data.image(0, 0)).all()
    with pytest.raises(InvalidClip, match=r"1\.png is a picture: set layout"):
        data.clip(0)
    with pytest.raises(InvalidClip, match="no frame 1: it has 1"):
        data.image(0, 1)


def test_clips_that_are_no_pictures_are_told_without_their_layout(tmp_path: Path):
    for name in ("happy", "fear"):
        file(tmp_path / "videos" / name / "1.mp4", 20)
        frames(tmp_path / "listed" / "clips" / name, 30)
    rows = [{"file_name": f"clips/{name}", "label": name} for name in ("happy", "fear")]
    (tmp_path / "listed" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for place in ("videos", "listed"):
        auto, named = (opened(tmp_path / place, layout=layout) for layout in ("auto", "clips"))
        assert auto.is_clips and auto.digest() == named.digest() and shown(auto) == shown(named)


@pytest.mark.parametrize("layout", ["auto", "imagefolder"])
def test_a_clip_among_pictures_says_which_layout_it_wants(tmp_path: Path, layout: str):
    for name in ("happy", "fear"):
        frames(tmp_path / name, 7, count=1)
    file(tmp_path / "fear" / "film.mp4", 20)
    data = opened(tmp_path, layout=layout)
    assert not data.is_clips and len(data) == 2
    (bad,) = data.bad_files
    assert bad.path.name == "film.mp4" and 'set layout = "clips"' in bad.reason


def test_metadata_names_clips_subjects_and_captions(tmp_path: Path):
    frames(tmp_path / "train" / "clips" / "7", 1)
    file(tmp_path / "train" / "x.webp", 2)
    rows = [
        {"file_name": "clips/7", "label": "happy", "caption": "she smiles", "subject": "S7"},
        {"file_name": "x.webp", "label": "sad", "subject": 3, "camera": "left"},
    ]
    (tmp_path / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = opened(tmp_path, split="train")
    assert shown(data) == [("train/clips/7", "happy", "S7", 3), ("train/x.webp", "sad", "3", 3)]
    assert data.samples[0].caption == "she smiles" and data.samples[1].camera == "left"
    rows[0]["subject"] = 1.5
    (tmp_path / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DatasetError, match=r"line 1: `subject` must be a name or an int, and is 1\.5"):
        opened(tmp_path, split="train")


def test_bad_clips_are_skipped_and_reported_or_fatal(tmp_path: Path):
    for name in "ab":
        frames(tmp_path / name / "good")
    (tmp_path / "a" / "empty").mkdir()
    (frames(tmp_path / "a" / "one frame") / "2.png").write_bytes(b"")
    (tmp_path / "b" / "notes.txt").write_text("no clip")
    cut = file(tmp_path / "b" / "cut.mp4", count=20)
    cut.write_bytes(cut.read_bytes()[:-300])
    data = opened(tmp_path)
    assert [e.relative for e in data.samples] == ["a/good", "b/good"]
    told = {report.path.name: report.reason for report in data.bad_files}
    assert told.keys() == {"empty", "one frame", "notes.txt", "cut.mp4"}
    assert told["empty"].startswith("has no frames") and told["one frame"].startswith("has a frame 2.png")
    assert told["notes.txt"].startswith("is no clip") and told["cut.mp4"].startswith("cannot be decoded")
    with pytest.raises(BadFile, match=r"\(and 3 more bad files\)"):
        opened(tmp_path, on_bad_file="fail")


def test_a_clip_that_goes_bad_later_is_named(tmp_path: Path):
    for name in "ab":
        frames(tmp_path / name / "1")
    data = opened(tmp_path)
    (tmp_path / "a" / "1" / "3.png").unlink()
    assert data.clip(0, [0, 1]).shape == (2, 4, 6, 3)
    with pytest.raises(BadFile, match=r"a/1 cannot be read any more .* no frame 2"):
        data.clip(0)


def test_a_frame_that_leads_out_is_a_bad_clip(tmp_path: Path):
    secret = frames(tmp_path / "elsewhere", 99)
    root = tmp_path / "data"
    for name in "ab":
        frames(root / name / "1")
    (frames(root / "a" / "2") / "4.png").symlink_to(secret / "1.png")
    (root / "b" / "2").symlink_to(secret)
    data = opened(root)
    assert [e.relative for e in data.samples] == ["a/1", "b/1"]
    assert all("leads out of the dataset" in report.reason for report in data.bad_files) and len(data.bad_files) == 2
    assert len(opened(root, links_to=[secret])) == 4
    (root / "a" / "1" / "2.png").unlink()
    (root / "a" / "1" / "2.png").symlink_to(secret / "1.png")
    with pytest.raises(BadFile, match="leads out of the dataset"):
        data.clip(0)


def test_a_class_without_clips_is_told(tmp_path: Path):
    frames(tmp_path / "a" / "1")
    (tmp_path / "b").mkdir()
    with pytest.raises(DatasetError, match="no clips of class 'b'"):
        opened(tmp_path)


# ---------------------------------------------------------------- DFEW


def dfew(root: Path, lists: str = "{split}(single-labeled)", place: str = "Clip/clip_224x224/{:05d}") -> Path:
    """Two clips of each class in each list; clip k of label l shows grey 10 l + k."""
    for split, first in (("train", 1), ("test", 15)):
        rows = ["video_name,label"]
        for number in range(14):
            rows.append(f"{first + number},{number % 7 + 1}")
            frames(root / place.format(first + number), first + number)
        for fold in (1, 2):
            path = root / "EmoLabel_DataSplit" / lists.format(split=split) / f"set_{fold}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(rows[: 15 - fold + 1]))
    return root


def test_dfew_as_it_is_published(tmp_path: Path):
    root = dfew(tmp_path)
    train = opened(root, layout="dfew", split="train", fold=1)
    assert train.classes == EMOTIONS and len(train) == 14 and train.is_clips
    first = train.by_id(sample_id("Clip/clip_224x224/00001"))
    assert (first.label, first.class_name, first.frames, first.subject) == (0, "happy", 3, None)
    assert train.by_id(sample_id("Clip/clip_224x224/00007")).class_name == "fear"
    assert (train.image(first.id) == clip_of(1)[0]).all()
    assert len(opened(root, layout="dfew", split="train", fold=2)) == 13
    test = opened(root, layout="auto", split="test", fold=1)  # told by its folders
    assert test.classes == EMOTIONS and {e.id for e in test.samples}.isdisjoint({e.id for e in train.samples})


@pytest.mark.parametrize(
    ("lists", "place"),
    [
        ("{split}", "Clip/clip_224x224_16f/{:05d}"),
        ("{split}(single-labeled)", "Clip/clip_224x224/clip_224x224_part_1/{:05d}"),
        ("{split}", "clip_224x16f/{:05d}"),
        ("{split}", "Clip/original/part_1/{}"),
    ],
)
def test_dfew_as_it_is_passed_on(tmp_path: Path, lists: str, place: str):
    data = opened(dfew(tmp_path, lists, place), layout="dfew", split="train", fold=1)
    assert [e.relative for e in data.samples] == sorted(place.format(number) for number in range(1, 15))


def test_full_clips_are_preferred_to_those_of_16_frames(tmp_path: Path):
    dfew(tmp_path)
    dfew(tmp_path, place="Clip/clip_224x224_16f/{:05d}")
    data = opened(tmp_path, layout="dfew", split="train", fold=1)
    assert {entry.path.parent.name for entry in data.samples} == {"clip_224x224"}


def test_a_clip_that_dfew_lists_and_does_not_have_is_bad(tmp_path: Path):
    root = dfew(tmp_path)
    for path in (root / "Clip" / "clip_224x224" / "00003").iterdir():
        path.unlink()
    (root / "Clip" / "clip_224x224" / "00003").rmdir()
    data = opened(root, layout="dfew", split="train", fold=1)
    assert [(bad.path.name, bad.reason[:12]) for bad in data.bad_files] == [("00003", "is not there")]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"split": "train"}, "DFEW is split in 5 ways: set `fold`"),
        ({"fold": 1}, "has the splits train and test"),
        ({"split": "val", "fold": 1}, "has the splits train and test"),
        ({"split": "train", "fold": 5}, r"DFEW's list was expected as .*set_5\.csv or .*set_5\.csv"),
    ],
)
def test_what_dfew_wants_is_said(tmp_path: Path, options: dict, said: str):
    with pytest.raises(DatasetError, match=said):
        opened(dfew(tmp_path), layout="dfew", **options)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("3", "line 2: expected a clip and its label"),
        ("3,8", "line 2: DFEW's labels are 1 to 7, and this is '8'"),
        ("3,happy", "line 2: DFEW's labels are 1 to 7"),
        ("../x,1", "line 2: expected the number of a clip"),
        ("1,1\n00001,2", "line 3: 00001 is listed before, in .*line 2"),
    ],
)
def test_a_bad_line_of_dfew_is_named(tmp_path: Path, line: str, said: str):
    root = dfew(tmp_path)
    path = root / "EmoLabel_DataSplit" / "train(single-labeled)" / "set_1.csv"
    path.write_text(f"video_name,label\n{line}\n")
    with pytest.raises(DatasetError, match=said):
        opened(root, layout="dfew", split="train", fold=1)


def test_folders_that_are_no_dfew(tmp_path: Path):
    root = dfew(tmp_path)
    shutil.rmtree(root / "Clip")
    with pytest.raises(DatasetError, match="has no clips of DFEW: expected folders of frames such as"):
        opened(root, layout="dfew", split="train", fold=1)
    for name in "ab":
        frames(tmp_path / "plain" / name / "1")
    with pytest.raises(DatasetError, match=r"fold = 1 is for DFEW, and .* is not laid out so"):
        opened(tmp_path / "plain", fold=1)


# ---------------------------------------------------------------- FERV39k


def ferv39k(root: Path, inner: str = "2_ClipsforFaceCrop", lists: str = "4_setups/All_scenes") -> Path:
    for split, first in (("train", 0), ("test", 50)):
        rows = []
        for number, name in enumerate(EMOTIONS):
            clip = f"Action/{name.capitalize()}/{first + number:04d}"
            frames(root / inner / clip, first + number)
            rows.append(f"{clip} {name.capitalize()}")
        (root / lists).mkdir(parents=True, exist_ok=True)
        (root / lists / f"{split}_All.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.mark.parametrize("inner", ["2_ClipsforFaceCrop", "2_ClipsforFaceCrop/2_ClipsforFaceCrop"])
def test_ferv39k(tmp_path: Path, inner: str):
    root = ferv39k(tmp_path, inner)
    train, test = (opened(root, layout=layout, split=s) for layout, s in (("ferv39k", "train"), ("auto", "test")))
    assert train.classes == test.classes == EMOTIONS
    entry = train.by_id(sample_id(f"{inner}/Action/Sad/0001"))
    assert entry.class_name == "sad" and (train.image(entry.id) == clip_of(1)[0]).all()
    assert {e.relative.split("/")[-1] for e in test.samples} == {f"{50 + n:04d}" for n in range(7)}


def test_mistakes_in_ferv39k(tmp_path: Path):
    root = ferv39k(tmp_path)
    path = root / "4_setups" / "All_scenes" / "train_All.csv"
    for line, said in (
        ("Action/Sad/0001 Gloomy", "line 1: expected a clip and one of happy, .* found 'Gloomy'"),
        ("../../secret Sad", "line 1: '../../secret' leads out"),
        ("/etc Sad", "line 1: '/etc' leads out"),
        ("alone", "line 1: expected a clip and its label"),
    ):
        path.write_text(line)
        with pytest.raises(DatasetError, match=said):
            opened(root, layout="ferv39k", split="train")
    with pytest.raises(DatasetError, match="fold = 2 is for DFEW"):
        opened(root, layout="ferv39k", split="test", fold=2)
    path.unlink()
    with pytest.raises(DatasetError, match="FERV39k's list was expected as"):
        opened(root, layout="ferv39k", split="train")


# ---------------------------------------------------------------- CK+


def ckplus(root: Path, codes: dict[str, str]) -> Path:
    """Sequences "S005/001" with these texts in their emotion files; "": no file."""
    for number, (name, text) in enumerate(codes.items()):
        subject, sequence = name.split("/")
        frames(root / "cohn-kanade-images" / name, 10 * number)
        place = root / "Emotion" / name
        place.mkdir(parents=True)
        if text:
            (place / f"{subject}_{sequence}_00000011_emotion.txt").write_text(text)
    return root


CODES = {"S005/001": "   3.0000000e+00\n", "S005/002": "5", "S010/001": " 1.0", "S010/002": "", "S011/001": "4"}
CODES |= {"S011/002": "6.0", "S014/001": "7", "S014/002": "2.0000000e+00"}


def test_ckplus_has_subjects_and_leaves_contempt_out(tmp_path: Path):
    data = opened(ckplus(tmp_path, CODES), layout="ckplus")
    assert data.classes == ("happy", "sad", "angry", "surprise", "disgust", "fear")
    assert {(e.relative.removeprefix("cohn-kanade-images/"), e.class_name, e.subject) for e in data.samples} == {
        ("S005/001", "disgust", "S005"),
        ("S005/002", "happy", "S005"),
        ("S010/001", "angry", "S010"),
        ("S011/001", "fear", "S011"),
        ("S011/002", "sad", "S011"),
        ("S014/001", "surprise", "S014"),
    }
    assert opened(tmp_path, layout="auto").digest() == data.digest()
    (tmp_path / "cohn-kanade-images").rename(tmp_path / "extended-cohn-kanade-images")
    assert len(opened(tmp_path, layout="auto")) == len(data)


def test_mistakes_in_ckplus(tmp_path: Path):
    root = ckplus(tmp_path, CODES)
    with pytest.raises(DatasetError, match=r"CK\+ has no split 'test'"):
        opened(root, layout="ckplus", split="test")
    path = root / "Emotion" / "S005" / "001" / "S005_001_00000011_emotion.txt"
    for text in ("9", "", "happy"):
        path.write_text(text)
        with pytest.raises(DatasetError, match=r"emotion\.txt: expected a code of 0 to 7"):
            opened(root, layout="ckplus")
    (root / "Emotion").rename(root / "emotions")
    with pytest.raises(DatasetError, match=r"CK\+'s emotions was expected as .*Emotion"):
        opened(root, layout="ckplus")
