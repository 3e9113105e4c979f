"""What is examined: synthetic images, the real ones that they were learnt from, and real ones that they were not.

They come from a run's folder, or from a folder of samples and the settings of the service that made them. Knows nothing
of how they are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from protocol import config as settings_file
from protocol.dataset import Dataset, DatasetConfig
from protocol.errors import ConfigError, DatasetError
from trainer import registry
from trainer.data.images import Frame
from trainer.pool import Pool
from trainer.privacy.image_set import ImageSet
from trainer.record import Record
from trainer.settings import TrainerConfig
from trainer.tasks.interface import Task

FEWEST = 2  # images of a kind


@dataclass(frozen=True)
class Subject:
    """`classes` name the labels of train and synthetic, and of held_out where `same_classes`."""

    title: str
    synthetic_are: str  # in words
    train: ImageSet
    held_out: ImageSet
    synthetic: ImageSet
    classes: Sequence[str]
    same_classes: bool  # false: the held-out images show other classes, as other people
    train_split: str
    held_out_split: str
    frame: Frame  # that all are brought to before their pixels are compared
    run: tuple[Record, Task] | None = None  # that trained on them; None: none is known of


def of_run(record: Record, held_out: str | None) -> Subject:
    """Everything that a run trained on.

    Args:
        held_out: split of its dataset that the generator has not seen; None: its test split.

    Raises:
        ConfigError: it trained on no synthetic samples, there is no such split, or there are too few images.
        DatasetError: the dataset or the split cannot be read, or has some of the classes only.
        CheckpointCorrupt: a file of its folder is damaged.
    """
    config = record.config
    ids = dict.fromkeys(row["id"] for row in record.selection if row["fate"] in ("trained", "pool"))
    if not ids:
        raise ConfigError(
            f"{record.folder} trained on no synthetic samples, so there is nothing to examine: let the run go on past "
            "its warm-up, or look at the generator's weights with `onthefly privacy`"
        )
    train = Dataset.open(config.dataset)
    candidates = Pool(record.folder / "batches").find(ids)
    synthetic = ImageSet.of_candidates(candidates, train.classes)
    told = f"the {len(ids):,} samples that the run {config.run} trained on"
    task = _task(config, train.classes)
    found = _subject(config.run, told, config.dataset, train, held_out or config.test_split, synthetic, task.frame)
    return replace(found, run=(record, task))


def _task(config: TrainerConfig, classes: Sequence[str]) -> Task:
    """What a run trained for; of a model without published weights, as it has its own."""
    kind = registry.resolve("task", config.task)
    plain = config.model | ({"pretrained": False} if config.model.get("pretrained") else {})
    return kind(settings_file.section({"trainer.model": plain}, "trainer.model", kind.Config), classes)


def of_samples(folder: Path, title: str, data: DatasetConfig, held_out: str | None) -> Subject:
    """A folder of synthetic images, laid out as a dataset.

    Args:
        title: what made them. data: the images that it learnt from. held_out: as in `of_run`, but without a default.

    Raises:
        As `of_run`.
    """
    train = Dataset.open(data)
    layout = "clips" if train.is_clips else "auto"
    made = Dataset.open(DatasetConfig(root=folder, layout=layout, classes=list(train.classes), on_bad_file="fail"))
    told = f"the {len(made):,} samples in {folder}"
    synthetic = ImageSet.of_dataset(made)
    *frames, height, width, _ = synthetic.pictures([0])[0].shape
    frame = Frame(height, width, frames=frames[0] if frames else None)
    return _subject(title, told, data, train, held_out, synthetic, frame)


def _subject(
    title: str,
    told: str,
    data: DatasetConfig,
    train: Dataset,
    held_out: str | None,
    synthetic: ImageSet,
    frame: Frame,
) -> Subject:
    if not held_out:
        raise ConfigError(
            "real images that the generator has not seen are the yardstick, and no split of them is named: say "
            "--held-out SPLIT, of the same dataset",
            param="held_out",
        )
    if held_out == data.split or data.split is None:
        raise ConfigError(
            f"--held-out {held_out} is not held out: the training images are "
            + (f"the split {data.split}" if data.split else "all of the dataset, for its `split` is not set")
            + ". Name a split that the generator has not seen",
            param="held_out",
        )
    others, same = _held_out(data, train, held_out)
    real = ImageSet.of_dataset(train)
    for images, kind in ((real, "training"), (others, f"held-out ({held_out})"), (synthetic, "synthetic")):
        if len(images) < FEWEST:
            raise ConfigError(f"there is only one {kind} image: {FEWEST} at least can be compared", param="held_out")
    return Subject(title, told, real, others, synthetic, train.classes, same, data.split, held_out, frame)


def _held_out(data: DatasetConfig, train: Dataset, split: str) -> tuple[ImageSet, bool]:
    """The images of a split, and whether they show the classes of the training images: all of them, or none."""
    config = data.model_copy(update={"split": split, "classes": list(train.classes), "max_per_class": None})
    try:
        return ImageSet.of_dataset(Dataset.open(config)), True
    except DatasetError as error:
        others = Dataset.open_identities(config)
        if set(others.classes) & set(train.classes):
            raise DatasetError(
                f"{error.message} (--held-out {split}: to compare within classes it must have all of the training "
                "images' classes and no other, or none of them)"
            ) from error
        return ImageSet.of_dataset(others), False
