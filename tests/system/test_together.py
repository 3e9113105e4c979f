"""A run that two processes train is the run that one trains: real torchrun, real service, the same samples."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch

from protocol.broker import EmbeddedBroker
from tests.system import ddp_worker
from tests.system.people import write_market
from tests.system.test_ddp import (
    SETTINGS,
    TOLERANCE,
    TORCHRUN,
    assert_close,
    metrics,
    trained_on,
    weights,
    write_settings,
)
from tests.system.test_identity import real_config
from tests.system.test_modes import PLAIN
from tests.system.test_privacy import FILTER, of, write_splits
from tests.system.whole import serving, trainer_config
from trainer import record
from trainer.books import open_books
from trainer.parallel import OneProcess
from trainer.settings import TrainerConfig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]  # of all: the first that runs trains for all
SYNTHETIC = PLAIN | {
    "mode": "synthetic",
    "feedback": {"criterion": "similarity", "fraction": 0.4},
    "similarity": {"enabled": True},
    "model": {"image_size": 8, "shift": 1},  # each process draws its own dropout
    "iterations": 3,
}


@dataclass(frozen=True)
class Trained:
    """A run, and what each of its processes saw."""

    config: TrainerConfig
    seen: list[ddp_worker.Record]
    broker: str

    @property
    def fates(self) -> list[tuple[int, str, str]]:
        """What became of every sample, in the order in which it came."""
        rows = record.rows(self.config.folder / "selection.jsonl")
        return [(row["iteration"], row["id"], row["fate"]) for row in rows]

    def asked(self) -> list[list[str]]:
        """Ids of the marginal samples of each iteration, hardest first."""
        told = record.Record.open(self.config.folder).feedback
        return [[sample.sample_id for sample in feedback.samples] for feedback in told]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Iterator[dict[tuple[str, int], Trained]]:
    """By name and number of processes. One torchrun trains all of two processes, one after the other."""
    folder = tmp_path_factory.mktemp("together")
    data, people = write_splits(folder / "data"), write_market(folder / "market", learnt=12, searched=6)
    with (
        EmbeddedBroker() as broker,
        serving(folder, broker.url, checkpoint, data, dataset={"root": data, "split": "train"}) as url,
    ):

        def configs(processes: int) -> dict[str, TrainerConfig]:
            made = partial(trainer_config, folder / str(processes), data, url, **of(data))
            made_of = {
                "plain": made(run="plain", test_split="", **SETTINGS),
                "private": made(run="private", **FILTER, **SETTINGS),
                "synthetic": made(run="synthetic", **SYNTHETIC),
            }
            if processes == 2:
                made_of["reid"] = real_config(folder / "2", people, "reid", run="reid", epochs=3)
            return made_of

        alone = {
            (name, 1): Trained(config, [ddp_worker.train(config, broker.url, OneProcess("cpu"))], broker.url)
            for name, config in configs(1).items()
        }
        yield alone | trained_by_two(folder, configs(2), broker.url)


def trained_by_two(folder: Path, configs: dict[str, TrainerConfig], broker: str) -> dict[tuple[str, int], Trained]:
    files = {name: write_settings(folder / f"{name}.toml", config) for name, config in configs.items()}
    command = [*TORCHRUN, "tests.system.ddp_worker", *map(str, files.values())]
    subprocess.run(command, env={**os.environ, "ONTHEFLY_BROKER_URL": broker}, timeout=300, check=True)
    kept = {
        name: [torch.load(file.with_suffix(f".{rank}"), weights_only=True) for rank in range(2)]
        for name, file in files.items()
    }
    return {
        (name, 2): Trained(config, [ddp_worker.Record(**seen) for seen in kept[name]], broker)
        for name, config in configs.items()
    }


def test_they_choose_and_learn_what_one_does(runs: dict[tuple[str, int], Trained]):
    one, two = runs["plain", 1], runs["plain", 2]
    assert len(one.asked()) == 3
    assert two.asked() == one.asked()
    kept = trained_on(one.config.folder)
    assert len(kept) == 30
    assert {fate for _, _, fate in kept} == {True, False}
    assert trained_on(two.config.folder) == kept
    (expected,) = one.seen
    for seen in two.seen:
        assert seen.chosen == expected.chosen
        assert seen.losses == pytest.approx(expected.losses, rel=TOLERANCE)
    assert any(not all(rows) for rows in expected.chosen)
    held = list(zip(*(seen.trained for seen in two.seen), strict=True))
    assert [sum(rows) for rows in held] == expected.trained
    assert any(first != second for first, second in held)  # shares are uneven, and the mean is over all rows
    assert_close(weights(one.config.folder), weights(two.config.folder))
    for ours, theirs in zip(metrics(one.config), metrics(two.config), strict=True):
        assert (ours.pop("devices"), theirs.pop("devices")) == (1, 2)
        assert ours.pop("device") == theirs.pop("device") == "cpu"
        numbers = {name for name, value in ours.items() if value is not None}
        assert numbers == {name for name, value in theirs.items() if value is not None}
        for name in numbers:
            assert ours[name] == pytest.approx(theirs[name], rel=TOLERANCE), name


def test_they_drop_for_privacy_what_one_does(runs: dict[tuple[str, int], Trained]):
    one, two = runs["private", 1], runs["private", 2]
    assert {fate for _, _, fate in one.fates} == {"privacy", "vog", "trained"}
    assert two.fates == one.fates
    assert open_books(two.config.folder, two.broker).balanced


def test_the_pool_that_stands_in_and_features_are_the_same(runs: dict[tuple[str, int], Trained]):
    """Rows are shared out unevenly."""
    one, two = runs["synthetic", 1], runs["synthetic", 2]
    assert one.asked() == two.asked()
    fates = [{(sample, fate) for _, sample, fate in run.fates} for run in (one, two)]
    assert fates[0] == fates[1] and {"pool", "trained", "similarity"} == {fate for _, fate in fates[0]}
    for mine, other in zip(metrics(one.config), metrics(two.config), strict=True):
        assert mine["train_top1"] == other["train_top1"] and mine["synthetic_rows"] == other["synthetic_rows"]
    assert open_books(two.config.folder, two.broker).balanced


def test_they_learn_identities_together(runs: dict[tuple[str, int], Trained]):
    """Each looks for positives and negatives among its own rows, which are whole groups of K."""
    first, last = metrics(runs["reid", 2].config)
    assert (last["devices"], last["queries"]) == (2, 6)
    assert last["mAP"] > 0.7 and last["loss_real"] < first["loss_real"]
