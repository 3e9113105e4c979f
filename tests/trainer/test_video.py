"""The task of clips: what it makes of them, what it refuses, and how it measures a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from protocol.dataset import Dataset, DatasetConfig
from protocol.errors import ConfigError, DatasetError
from tests.trainer.clip_folders import FRAMES, SIDE, moving, write_clip, write_clips
from tests.trainer.run_folder import write_dataset
from trainer import registry
from trainer.data.splits import open_splits
from trainer.settings import TrainerConfig
from trainer.tasks.video import Video

CLASSES = ("down", "left", "right")
TINY = {"model": "small_cnn", "image_size": 8, "frames": 4, "hidden": 8, "heads": 2}


def task(classes: tuple[str, ...] = CLASSES, **settings: object) -> Video:
    kind = registry.resolve("task", "video")
    return kind(kind.Config(**(TINY | settings)), classes)


def clips(rows: int = 3, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (rows, 4, 8, 8, 3), dtype=torch.uint8, generator=draw)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DatasetConfig:
    root = tmp_path_factory.mktemp("clips")
    write_clips(root, {"left": 2, "right": 1, "down": 3}, split="test", seed=500)
    return write_clips(root, {"left": 3, "right": 2, "down": 4})


def config(data: DatasetConfig, **settings: object) -> TrainerConfig:
    return TrainerConfig.model_validate({"dataset": data, "task": "video", "model": TINY} | settings)


# ---------------------------------------------------------------- settings


def test_defaults_are_the_papers():
    found = Video.Config()
    assert (found.model, found.frames, found.image_size) == ("resnet18", 16, 224)
    assert (found.head, found.layers, found.hidden) == ("lstm", 2, 256)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"head": "transformer", "hidden": 9}, "hidden = 9 is no multiple of heads = 2"),
        ({"head": "mamba"}, "lstm"),
        ({"frames": 1}, "greater than or equal to 2"),
        ({"zero_shot": {"layout": "ckplus"}}, "root"),
    ],
)
def test_settings_that_make_no_sense(settings: dict, said: str):
    with pytest.raises(ValidationError, match=said):
        task(**settings)


def test_models_of_frames_that_do_not_exist():
    with pytest.raises(ConfigError, match="unknown model 'resnet81'"):
        task(model="resnet81")
    with pytest.raises(ConfigError, match="cannot take images of 8 pixels"):
        task(model="vgg13").build_model()


# ---------------------------------------------------------------- the model and its input


def test_input_is_normalised_per_channel_of_each_frame():
    made, x = task(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 1.0)), clips()
    found = made.preprocess(x)
    assert found.shape == (3, 4, 3, 8, 8)
    for channel, (mean, std) in enumerate(((0.1, 0.5), (0.2, 0.25), (0.3, 1.0))):
        torch.testing.assert_close(found[:, :, channel], (x[..., channel].float() / 255 - mean) / std)


@pytest.mark.parametrize("head", ["lstm", "transformer"])
def test_the_model_predicts_and_tells_its_features(head: str):
    made = task(head=head)
    model, x = made.build_model(), made.preprocess(clips())
    features, logits = made.features(model, x), made.predict(model, x)
    assert features.shape == (3, 8) and model.training
    torch.testing.assert_close(model.head(features), logits)
    torch.testing.assert_close(made.true_logit(logits, torch.tensor([2, 0, 1])), logits[[0, 1, 2], [2, 0, 1]])
    torch.testing.assert_close(
        made.losses(logits, torch.tensor([2, 0, 1])), -logits.log_softmax(1)[[0, 1, 2], [2, 0, 1]]
    )


def test_layers_and_the_network_of_frames_are_the_settings():
    model = task(layers=3, hidden=12).build_model()
    assert len(model.of_sequence.lstm.of_input) == 3 and model.head.in_features == 12
    timm_made = task(model="resnet18", image_size=32)
    assert timm_made.build_model().of_sequence.lstm.of_input[0].in_features == 512


def test_the_network_of_frames_can_be_published():
    made = task(model="resnet18", image_size=32)
    model = made.build_model()
    found = made.backbone(model)
    assert found.name == "resnet18" and found.size == (32, 32)
    assert torch.equal(found.state["conv1.weight"], model.of_frames.conv1.weight)
    with pytest.raises(ConfigError, match="small_cnn is not a model of timm"):
        task().backbone(task().build_model())


# ---------------------------------------------------------------- augmentation

AUGMENTATIONS = {
    "moved": {"shift": 2, "flip": True},
    "erased": {"random_erasing": 1.0},
    "randaugment": {"randaugment": 2},
}


@pytest.mark.parametrize("how", AUGMENTATIONS)
def test_all_frames_of_a_clip_change_alike(how: str):
    """A clip of equal frames stays one, and rows differ from each other."""
    made = task(**AUGMENTATIONS[how])
    still = clips(6)[:, :1].expand(6, 4, 8, 8, 3)
    x = made.preprocess(still)
    found = made.augment(x, torch.Generator().manual_seed(3))
    assert found.shape == x.shape and not torch.equal(found, x)
    assert torch.equal(found, found[:, :1].expand_as(found))
    same = made.augment(made.preprocess(still[:1].expand_as(still)), torch.Generator().manual_seed(3))
    assert len({row.numpy().tobytes() for row in same}) > 1


@pytest.mark.parametrize("how", AUGMENTATIONS)
def test_a_frame_changes_as_an_image_would(how: str):
    made = task(**AUGMENTATIONS[how])
    x = made.preprocess(clips(3))
    found = made.augment(x, torch.Generator().manual_seed(5))
    for frame in range(4):
        alone = made.augment(x[:, frame], torch.Generator().manual_seed(5))
        if how != "randaugment" or frame == 0:  # what looks at an image's histogram looks at each frame's own
            torch.testing.assert_close(found[:, frame], alone)


@pytest.mark.parametrize("how", AUGMENTATIONS)
def test_a_part_of_a_batch_becomes_what_it_becomes_in_the_whole(how: str):
    made = task(**AUGMENTATIONS[how])
    x = made.preprocess(clips(5))
    whole = made.augment(x, torch.Generator().manual_seed(0))
    part = made.augment(x[2:4], torch.Generator().manual_seed(0), first=2, total=5)
    assert torch.equal(part, whole[2:4])


# ---------------------------------------------------------------- what it is measured on


def perfect(images) -> Tensor:
    """Logits of someone who knows, but takes "right" for "left"."""
    labels = images.labels.clone()
    labels[labels == 2] = 1
    return torch.nn.functional.one_hot(labels, 3).float()


def test_recalls_of_a_test_split(data: DatasetConfig):
    made, dataset = task(), Dataset.open(data)
    test = made.open_test(config(data), dataset)
    assert test.split.images.shape == (6, 4, 8, 8, 3) and test.zero_shot is None
    found = made.evaluate(test, perfect, None)
    assert found == {
        "headline": "test_uar",
        "test_uar": pytest.approx(2 / 3),
        "test_war": pytest.approx(5 / 6),
        "test_top1": pytest.approx(5 / 6),
        "worst_case_disparity": 0.0,
        "per_class": [1.0, 1.0, 0.0],
        "confusion": [[3, 0, 0], [0, 2, 0], [0, 1, 0]],
    }
    assert made.open_test(config(data, test_split=""), dataset) is None


def test_zero_shot_by_subject(tmp_path: Path, data: DatasetConfig):
    """Other clips, of some of the classes in another order, whose subjects are known."""
    rows = []
    for number, (name, subject) in enumerate([("right", "S1"), ("left", "S1"), ("left", "S2"), ("right", "S2")]):
        write_clip(tmp_path / f"{number}", moving(name, number))
        rows.append(f'{{"file_name": "{number}", "label": "{name}", "subject": "{subject}"}}')
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows[:3]))
    other = {"root": tmp_path, "layout": "clips", "classes": ["right", "left"]}
    made = task(zero_shot=other)
    test = made.open_test(config(data, test_split=""), Dataset.open(data))
    assert test.split is None and test.zero_shot.labels.tolist() == [2, 1, 1]
    assert made.evaluate(test, perfect, None) == {
        "headline": "zero_shot_uar",
        "zero_shot_uar": 0.5,
        "zero_shot_war": pytest.approx(2 / 3),
        "zero_shot_per_class": [None, 1.0, 0.0],
        "zero_shot_confusion": [[0, 0, 0], [0, 2, 0], [0, 1, 0]],
        "zero_shot_by_subject": {"subjects": 2, "mean": 0.75, "deviation": 0.25},
    }
    with pytest.raises(ConfigError, match="zero_shot has the class 'right', and the model learns down, left"):
        task(("down", "left"), zero_shot=other).open_test(config(data, test_split=""), Dataset.open(data))


def test_zero_shot_of_pictures_is_refused(tmp_path: Path, data: DatasetConfig):
    write_dataset(tmp_path)
    made = task(zero_shot={"root": tmp_path, "split": "train"})
    with pytest.raises(ConfigError, match="zero_shot: a sample is an image"):
        made.open_test(config(data, test_split=""), Dataset.open(data))


def test_a_test_split_that_is_not_there_is_told(data: DatasetConfig):
    with pytest.raises(DatasetError, match=r'no split .val. .*trainer\.test_split = "val"'):
        task().open_test(config(data, test_split="val"), Dataset.open(data))


def test_clips_want_a_task_of_clips_and_pictures_one_of_pictures(tmp_path: Path, data: DatasetConfig):
    pictures = write_dataset(tmp_path)
    with pytest.raises(ConfigError, match="a sample is an image, and the task wants clips: set layout"):
        open_splits(config(data), pictures, task())
    kind = registry.resolve("task", "classification")
    with pytest.raises(ConfigError, match=r"a sample is a clip, and the task wants images: set trainer\.task"):
        open_splits(config(data), Dataset.open(data), kind(kind.Config(), CLASSES))


def test_training_clips_are_spread_frames_at_the_models_size(data: DatasetConfig):
    dataset = Dataset.open(data)
    splits = open_splits(config(data, test_split=""), dataset, task(image_size=SIDE))
    assert splits.real.images.shape == (9, 4, SIDE, SIDE, 3)
    whole = dataset.clip(4)
    assert len(whole) == FRAMES and np.array_equal(splits.real.images[4].numpy(), whole[[0, 1, 3, 4]])
