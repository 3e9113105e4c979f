"""Which classes are scarce, how many samples are asked for them, and that they are asked for and taken."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from protocol import codec
from protocol.dataset import Dataset
from protocol.errors import ConfigError, DatasetError
from protocol.messages import ClassShortage, class_source
from tests.trainer.clip_folders import write_clips
from tests.trainer.test_pool import make_batch
from trainer.data.images import RealImages
from trainer.data.splits import open_splits
from trainer.feed import _stranger
from trainer.selection.scarcity import scarce, share
from trainer.settings import TrainerConfig
from trainer.shortages import before_training, shortages
from trainer.source import OfflinePool, RealSamples, Wanted, question
from trainer.tasks.video import Video, VideoConfig

# ---------------------------------------------------------------- the rule


def test_the_papers_classes():
    """DFEW's fold: happy, sad, neutral, angry, surprise, disgust, fear, with the recalls of Table 2."""
    counts = [1970, 1525, 1840, 1705, 1176, 116, 724]
    recalls = [0.8, 0.6, 0.6, 0.6, 0.51, 0.0, 0.36]
    assert scarce(recalls, counts, recall=0.5, part=1 / 7) == [5, 6]
    assert scarce(recalls, counts, recall=0.55, part=1 / 7) == [4, 5, 6]
    assert scarce([None] * 7, counts, recall=0.5, part=1 / 7) == [4, 5, 6]
    assert scarce(recalls, counts, recall=0.5, part=0.05) == [5]


@given(
    classes=st.lists(st.tuples(st.none() | st.floats(0, 1), st.integers(0, 50)), min_size=1, max_size=8),
    recall=st.floats(0.01, 1),
    part=st.floats(0.01, 1),
)
def test_a_class_is_scarce_by_both_or_not_at_all(classes, recall: float, part: float):
    recalls, counts = zip(*classes, strict=True)
    found = scarce(recalls, counts, recall=recall, part=part)
    for label in range(len(classes)):
        rare = counts[label] < part * sum(counts)
        bad = recalls[label] is None or recalls[label] < recall
        assert (label in found) == (rare and bad)


@given(total=st.integers(1, 2000), rounds=st.integers(1, 40), classes=st.integers(1, 7))
def test_shares_make_about_the_total(total: int, rounds: int, classes: int):
    each = share(total, rounds, classes)
    assert each >= 1 and total <= each * rounds * classes < total + rounds * classes


# ---------------------------------------------------------------- a run's


def config(tmp_path: Path, scarcity: dict | None = None, **settings: object) -> TrainerConfig:
    data = {"root": tmp_path, "split": "train", "layout": "clips"}
    feedback = {"scarcity": {"enabled": True} | (scarcity or {})} | settings.pop("feedback", {})
    return TrainerConfig.model_validate({"dataset": data, "feedback": feedback} | settings)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    write_clips(tmp_path, {"left": 6, "right": 5, "down": 1})  # labels: down 0, left 1, right 2
    return Dataset.open(config(tmp_path).dataset)


def test_a_pool_is_asked_for_rare_classes(tmp_path: Path, dataset: Dataset):
    (short,) = before_training(config(tmp_path, mode="offline"), dataset)
    assert short == ClassShortage(label=0, class_name="down", images=500)  # less than a seventh, of which all 500
    both = before_training(config(tmp_path, {"part": 0.45, "total": 31}, mode="offline"), dataset)
    assert [(one.class_name, one.images) for one in both] == [("down", 16), ("right", 16)]
    named = before_training(config(tmp_path, {"classes": ["left"], "clips": 7}, mode="offline"), dataset)
    assert named == [ClassShortage(label=1, class_name="left", images=7)]
    assert before_training(config(tmp_path, {"enabled": False}, mode="offline"), dataset) == []
    assert before_training(config(tmp_path, {"part": 0.01}, mode="offline"), dataset) == []


class Run:
    """As much of one as `shortages` looks at, whose model takes every clip for `says`."""

    def __init__(self, config: TrainerConfig, dataset: Dataset, says: int):
        self.config, self.says, self.task = config, says, Video(VideoConfig(**config.model), dataset.classes)
        self.splits = open_splits(config, dataset, self.task)
        self.real = self.splits.real

    def predict(self, data: RealImages) -> torch.Tensor:
        assert data is not self.real, "what is trained on is soon known by heart"
        return torch.eye(len(self.task.classes))[[self.says] * len(data)]

    def scarce(self) -> list[str]:
        return [short.class_name for short in shortages(self)]


SMALL = {"task": "video", "model": {"model": "small_cnn", "image_size": 16, "frames": 2}, "test_split": ""}


def test_recall_is_that_on_samples_that_are_not_trained_on(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    write_clips(tmp_path, {"left": 6, "right": 4, "down": 2})
    dataset = Dataset.open(config(tmp_path).dataset)
    assert Run(config(tmp_path, {"part": 0.4}, **SMALL), dataset, 0).scarce() == ["down", "right"]  # rarity alone
    held_out = config(tmp_path, {"part": 0.4}, thresholds={"auto": True, "held_out": 0.5}, **SMALL)
    assert Run(held_out, dataset, 0).scarce() == ["right"] and Run(held_out, dataset, 2).scarce() == ["down"]
    by_split = config(tmp_path, {"part": 0.4, "split": "val"}, **SMALL)
    with pytest.raises(DatasetError, match=r'no split \'val\'.*\(trainer\.feedback\.scarcity\.split = "val"\)'):
        Run(by_split, dataset, 0)
    write_clips(tmp_path, {"left": 1, "right": 1, "down": 1}, split="val")
    assert Run(by_split, dataset, 0).scarce() == ["right"] and Run(by_split, dataset, 2).scarce() == ["down"]
    named = config(tmp_path, {"classes": ["left"], "split": "val"}, **SMALL)
    assert Run(named, dataset, 1).scarce() == ["left"] and not caplog.records
    Run(config(tmp_path, {"split": "val"}, **SMALL | {"test_split": "val"}), dataset, 0)
    assert "is not of unseen samples" in caplog.text  # never silently


def test_a_class_that_there_is_not_is_named(tmp_path: Path, dataset: Dataset):
    with pytest.raises(ConfigError, match="names 'up', and the dataset has down, left, right"):
        before_training(config(tmp_path, {"classes": ["left", "up"]}, mode="offline"), dataset)


def test_the_total_is_shared_over_the_iterations_that_ask(tmp_path: Path, dataset: Dataset):
    (short,) = before_training(config(tmp_path, iterations=13, warmup_iterations=3), dataset)
    assert short.images == 50


def test_the_question_names_samples_and_classes(tmp_path: Path, dataset: Dataset):
    short = [ClassShortage(label=0, class_name="down", images=4)]
    settings = config(tmp_path)
    asked = question(settings, RealSamples(dataset, False), 3, 40, Wanted([2, 0], [0.1, 0.2], short))
    assert [one.sample_id for one in asked.samples] == [dataset.samples[2].id, dataset.samples[0].id]
    assert asked.classes == short and asked.feedback == 3
    assert question(settings, RealSamples(dataset, False), 3, 40, Wanted([], [], short)).samples == []
    assert Wanted([], []).nothing and not Wanted([], [], short).nothing


def test_a_first_frame_travels_where_pixels_do(tmp_path: Path, dataset: Dataset):
    found = RealSamples(dataset, send_pixels=True).named(1, 0.5)
    assert (codec.image_from_base64(found.pixels) == dataset.image(1, 0)).all()


class Everything:
    """A pool of samples of these sources."""

    def __init__(self, *sources: str):
        self.candidates = [SimpleNamespace(sample=SimpleNamespace(source_id=source)) for source in sources]

    def everything(self) -> list:
        return self.candidates


def test_an_offline_pool_gives_what_is_scarce_now(tmp_path: Path, dataset: Dataset):
    sources = [dataset.samples[0].id, dataset.samples[1].id, class_source("down"), class_source("left")]
    pool = Everything(*sources)
    short = [ClassShortage(label=0, class_name="down", images=4)]
    source = OfflinePool(config(tmp_path, mode="offline"), dataset, pool)
    taken = [candidate.sample.source_id for candidate in source.take(5, Wanted([1], [0.1], short))]
    assert taken == [dataset.samples[1].id, "class:down"]
    assert source.take(5, Wanted([], [])) == []
    static = OfflinePool(config(tmp_path, mode="offline", pool_match="all"), dataset, pool)
    assert len(static.take(5, Wanted([], []))) == 4


def test_samples_of_a_class_that_was_not_asked_for_are_strangers(tmp_path: Path, dataset: Dataset):
    short = [ClassShortage(label=0, class_name="down", images=4)]
    asked = question(config(tmp_path), RealSamples(dataset, False), 0, 0, Wanted([], [], short))
    batch, _ = make_batch(0, 0, 1, ["class:down"])
    of_down = batch.samples[0].model_copy(update={"label": 0, "class_name": "down"})
    assert _stranger(batch.model_copy(update={"samples": [of_down]}), asked) is None
    for wrong in ({"label": 1}, {"class_name": "left"}, {"source_id": "class:left", "class_name": "left", "label": 1}):
        stranger = _stranger(batch.model_copy(update={"samples": [of_down.model_copy(update=wrong)]}), asked)
        assert stranger is not None and "is of class" in stranger.message


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"scarcity": {"enabled": False}, "feedback": {"enabled": False}}, "nothing would be asked for"),
        ({"mode": "synthetic", "feedback": {"enabled": False}}, "nothing would be asked for"),
        ({"feedback": {"enabled": False}, "thresholds": {"auto": True}}, "leaves no fraction to learn"),
        ({"scarcity": {"classes": ["a", "a"]}}, "names a class twice"),
        ({"scarcity": {"classes": []}}, "at least 1"),
    ],
)
def test_settings_that_make_no_sense(tmp_path: Path, settings: dict, said: str):
    with pytest.raises(ValidationError, match=said):
        config(tmp_path, **settings)
