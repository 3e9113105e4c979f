"""What is compared: synthetic clips, of a run or in a folder, and the real clips of the same classes.

Real clips of other classes are left out, as the paper compares clips of the scarce classes: which classes occur would
count as a difference otherwise. Knows nothing of how clips are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from protocol import config
from protocol.dataset import Dataset, DatasetConfig
from protocol.dataset_clips import told_by_folders
from protocol.errors import ConfigError
from trainer.pool import Pool
from trainer.record import Record, rows
from trainer.video_quality.clip_set import ClipSet

TRAINED = ("trained", "pool")  # fates of samples that a run trained on


def trained_on(folder: Path) -> list[str]:
    """Ids of the synthetic samples that a run trained on, each once."""
    return list(dict.fromkeys(row["id"] for row in rows(folder / "selection.jsonl") if row["fate"] in TRAINED))


def compared(made: Path, real: Path | None, overrides: Sequence[str]) -> tuple[ClipSet, ClipSet]:
    """Synthetic clips, and the real ones of their classes.

    Args:
        made: folder of a run, whose clips that it trained on are taken, or one laid out as a dataset of clips.
        real: settings file that names a dataset, of the generator or else of the trainer; or its folder; None: that of
            the run. overrides: of that file.

    Raises:
        ConfigError: nothing is there to compare. DatasetError: a dataset cannot be read.
    """
    if (made / "settings.toml").is_file():
        record = Record.open(made)
        dataset = _real(real, overrides) if real else _clips(Dataset.open(record.config.dataset), made)
        own = Dataset.open(record.config.dataset) if real else dataset  # says who the clips begin with
        synthetic = ClipSet.of_candidates(Pool(made / "batches").find(trained_on(made)), own)
    elif real is None:
        raise ConfigError(f"{made} is no run's folder, which would name the real clips: say --real", param="real")
    else:
        dataset, synthetic = _real(real, overrides), ClipSet.of_dataset(_folder(made))
    if not len(synthetic):
        raise ConfigError(f"{made} has no synthetic clips that were trained on: let the run go on", param="made")
    if unknown := sorted(set(synthetic.texts) - set(dataset.classes)):
        raise ConfigError(
            f"{made} has clips of {', '.join(unknown)}, and the real ones are of {', '.join(dataset.classes)}: give "
            "the classes the same names",
            param="made",
        )
    return synthetic, ClipSet.of_dataset(dataset, set(synthetic.texts))


def _real(path: Path, overrides: Sequence[str]) -> Dataset:
    if path.is_dir():
        return _folder(path)
    settings = config.load(path, overrides)
    config.check_tables(settings, config.TABLES)
    return _clips(Dataset.open(DatasetConfig.of_service(settings)), path)


def _folder(path: Path) -> Dataset:
    """Clips of any classes, be it only one."""
    return _clips(Dataset.open_identities(DatasetConfig(root=path, layout=told_by_folders(path) or "clips")), path)


def _clips(dataset: Dataset, path: Path) -> Dataset:
    if not dataset.is_clips:
        raise ConfigError(f'{path} is about pictures, not clips: set layout = "clips" in the dataset', param="real")
    return dataset
