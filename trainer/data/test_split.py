"""Parts of the real samples that a classifier is measured on: other splits of the dataset that it learns from."""

from __future__ import annotations

from protocol.dataset import Dataset
from protocol.errors import DatasetError
from trainer.data.images import Frame, RealImages
from trainer.settings import TrainerConfig


def open_test_split(config: TrainerConfig, dataset: Dataset, frame: Frame) -> RealImages | None:
    """The split `test_split` of the same dataset; None: the settings name none. Else as `open_split`."""
    if not config.test_split:
        return None
    said = f'trainer.test_split = "{config.test_split}"; set it to "" when nothing is held out'
    return open_split(config, dataset, frame, config.test_split, said)


def open_split(config: TrainerConfig, dataset: Dataset, frame: Frame, split: str, said: str) -> RealImages:
    """Another split of the same dataset.

    Args:
        dataset: the real samples to train on. frame: the size that images are brought to.
        said: what names the split, for messages.

    Raises:
        DatasetError: there is no such split.
    """
    # a label means the same class; how many are learnt says nothing of how many are looked at
    differs = {"split": split, "classes": list(dataset.classes), "max_per_class": None}
    try:
        return RealImages(Dataset.open(config.dataset.model_copy(update=differs)), frame, config.cache_gib)
    except DatasetError as error:
        raise DatasetError(f"{error.message} ({said})") from error
