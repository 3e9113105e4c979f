"""The part of the real samples that a classifier is tested on: another split of the dataset that it learns from."""

from __future__ import annotations

from protocol.dataset import Dataset
from protocol.errors import DatasetError
from trainer.data.images import Frame, RealImages
from trainer.settings import TrainerConfig


def open_test_split(config: TrainerConfig, dataset: Dataset, frame: Frame) -> RealImages | None:
    """The split `test_split` of the same dataset; None: the settings name none.

    Args:
        dataset: the real samples to train on. frame: the size that images are brought to.

    Raises:
        DatasetError: there is no such split.
    """
    if not config.test_split:
        return None
    # a label means the same class; how many are learnt says nothing of how many are looked at
    differs = {"split": config.test_split, "classes": list(dataset.classes), "max_per_class": None}
    try:
        test = Dataset.open(config.dataset.model_copy(update=differs))
    except DatasetError as error:
        raise DatasetError(
            f'{error.message} (trainer.test_split = "{config.test_split}"; set it to "" when nothing is held out)'
        ) from error
    return RealImages(test, frame, config.cache_gib)
