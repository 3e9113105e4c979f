"""A pool that another run had made: what is in it, and how a run takes it over.

    python -m trainer.ready_made runs/pets

A pool is what was answered to feedback 0 of a run of mode offline or synthetic: so many images for every real sample.
The run that takes it over has its files in its own folder, as links where the file system allows: it asks nobody, and
the other run may be deleted. Loads no torch.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from protocol.entries import Sample
from protocol.errors import ConfigError, OnTheFlyError
from protocol.messages import class_source, sample_id
from trainer.durable import write_durably
from trainer.folder import MADE_FOR
from trainer.metrics.device_hours import read_adaptation, write_adaptation
from trainer.record import Record
from trainer.settings import TrainerConfig

NUMBER = f"{0:06d}"  # of the feedback that asks for a pool, in names of files


@dataclass(frozen=True)
class Contents:
    """What a pool holds. Counts are of synthetic samples."""

    run: str  # that had it made
    sources: int  # real samples it was made for
    per_source: int  # m
    for_classes: dict[str, int]  # scarce class -> samples that were made for it as such
    classes: dict[str, int]  # class name -> how many
    weights: dict[str, int]  # "name@version (digest)" -> how many
    near_copies: int
    failed: int  # that were asked for and could not be made
    whole: bool  # every work unit was answered
    dataset: str  # digest of the real samples
    adapting: dict[str, float]  # "name@version" -> seconds of its weights, and of those that these were made from


def contents(folder: Path) -> Contents:
    """What is in the pool of a run.

    Raises:
        ConfigError: the folder holds no run, or a run without a pool.
    """
    record = Record.open(folder)
    asked = next((feedback for feedback in record.feedback if feedback.feedback == 0), None)
    if not record.config.has_pool or asked is None:
        raise ConfigError(
            f"{folder} is of mode {record.config.mode} and has no pool: name a run of mode offline or synthetic",
            param="pool_from",
        )
    batches = [batch for batch in record.batches if batch.feedback == 0]
    samples = [sample for batch in batches for sample in batch.samples]
    missing = [name for batch in batches for name in batch.missing]
    for_classes = {short.class_name: _made_for(samples, class_source(short.class_name)) for short in asked.classes}
    ids = {
        sample_id(asked.run, 0, class_source(short.class_name), index)
        for short in asked.classes
        for index in range(short.images)
    }
    of_samples = len({sample.id for sample in samples} - ids) + len(set(missing) - ids)
    names = {str(sample.weights) for sample in samples}
    others = {str(sample.weights) for sample in record.samples()} - names
    return Contents(
        run=asked.run,
        sources=len(asked.samples),
        per_source=of_samples // len(asked.samples) if asked.samples else 0,
        for_classes=for_classes,
        classes=dict(sorted(Counter(str(sample.class_name) for sample in samples).items())),
        weights=dict(Counter(f"{sample.weights} ({sample.weights.digest[:12]})" for sample in samples)),
        near_copies=sum(sample.near_copy for sample in samples),
        failed=len(missing),
        whole=bool(batches) and len(batches) == batches[0].units,
        dataset=json.loads((folder / MADE_FOR).read_text())["dataset"],
        adapting={name: took for name, took in read_adaptation(folder).items() if name not in others},
    )


def _made_for(samples: Sequence[Sample], source: str) -> int:
    return sum(sample.source_id == source for sample in samples)


def take_over(config: TrainerConfig, dataset: str) -> None:
    """Put the pool of the run `config.pool_from` into the folder of this one; if that has a pool, it is kept.

    Args:
        dataset: digest of the real samples that the pool must be for.

    Raises:
        ConfigError: there is no such pool, it is not whole, or it is another than asked for.
        DiskFull.
    """
    pool_from, folder = config.pool_from, config.folder
    if (folder / "feedback" / f"{NUMBER}.json").exists():
        return
    found = contents(pool_from)
    if not found.whole:
        raise ConfigError(f"the pool of {pool_from} is not whole: let that run finish making it", param="pool_from")
    if found.dataset != dataset:
        raise ConfigError(
            f"the pool of {pool_from} is for other real samples: set trainer.dataset to that run's, or have a new pool "
            "made (leave trainer.pool_from out)",
            param="pool_from",
        )
    if config.feedback.enabled:
        _check_number(config, found.per_source)
    if config.feedback.scarcity.enabled:
        _check_scarce(config, found.for_classes)
    for path in sorted((pool_from / "batches").glob(f"{NUMBER}-*.safetensors")):
        _link(path, folder / "batches" / path.name)
    for path in sorted((pool_from / "batches").glob(f"{NUMBER}-*.json")):
        _copy(path, folder / "batches" / path.name)
    if found.adapting:
        write_adaptation(folder, found.adapting)
    for name in ("accepted", "feedback"):  # the question last: with it, the pool is whole here
        _copy(pool_from / name / f"{NUMBER}.json", folder / name / f"{NUMBER}.json")


def _check_number(config: TrainerConfig, found: int) -> None:
    """Raises ConfigError unless the pool has as many images of each real sample as this run wants."""
    if config.mode == "synthetic":
        wanted, advice = 1, "name a run of mode synthetic, whose pool has one"
    else:
        wanted, advice = config.feedback.images_per_sample, "set trainer.feedback.images_per_sample to its number"
    if wanted not in (None, found):
        raise ConfigError(
            f"the pool of {config.pool_from} has {found} images of each real sample, and {wanted} are wanted: "
            f"{advice}, or have a new pool made (leave trainer.pool_from out)",
            param="pool_from" if config.mode == "synthetic" else "images_per_sample",
        )


def _check_scarce(config: TrainerConfig, found: Collection[str]) -> None:
    """Raises ConfigError unless the pool has samples for scarce classes, and for those that the settings name."""
    lacking = [name for name in config.feedback.scarcity.classes or () if name not in found]
    if lacking or not found:
        raise ConfigError(
            f"the pool of {config.pool_from} has no samples of scarce classes{' ' if lacking else ''}"
            f"{', '.join(lacking)}: change feedback.scarcity, or have a new pool made (leave trainer.pool_from out)",
            param="pool_from",
        )


def _link(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        return
    try:
        os.link(path, target)
    except OSError:  # another file system, or one without links
        _copy(path, target)


def _copy(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    write_durably(target, path.read_bytes())


def table(pool: Contents) -> str:
    """The contents as lines of text."""
    made = sum(pool.classes.values())
    lines = [
        f"pool of run {pool.run}{'' if pool.whole else ', not whole'}",
        f"{'samples':<24}{made:>8}",
        f"{'real samples':<24}{pool.sources:>8}",
        f"{'of each':<24}{pool.per_source:>8}",
        *(f"{f'of scarce class {name}':<24}{number:>8}" for name, number in pool.for_classes.items()),
        f"{'near copies':<24}{pool.near_copies:>8}",
        f"{'failed':<24}{pool.failed:>8}",
    ]
    lines += [f"  {f'class {name}':<22}{count:>8}" for name, count in pool.classes.items()]
    return "\n".join(lines + [f"  made by {weights}: {count}" for weights, count in pool.weights.items()])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what is in a pool; returns the exit status: 0, or 2 when there is none."""
    parser = argparse.ArgumentParser(prog="python -m trainer.ready_made", description="What is in a run's pool.")
    parser.add_argument("folder", type=Path, help="the run's folder")
    try:
        print(table(contents(parser.parse_args(arguments).folder)))
    except OnTheFlyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
