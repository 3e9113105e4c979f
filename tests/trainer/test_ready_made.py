"""Pools that are not to be had, and the folder that takes one over."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from protocol.dataset import DatasetConfig
from protocol.errors import ConfigError
from protocol.messages import WeightsRef
from tests.trainer.run_folder import RunFolder, write_dataset
from trainer import ready_made
from trainer.folder import check_made_for
from trainer.metrics.device_hours import read_adaptation, write_adaptation
from trainer.pool import Pool, images
from trainer.record import Record
from trainer.settings import TrainerConfig

DIGEST = "of the real samples"


@pytest.fixture
def made(tmp_path: Path) -> RunFolder:
    """A pool of 2 images for each of 10 real samples, in three units; two samples of the last one failed."""
    dataset = write_dataset(tmp_path / "data")
    run = RunFolder(tmp_path / "runs" / "first", dataset, DatasetConfig(root=tmp_path / "data"), mode="offline")
    run.ask(0, range(10))
    run.answer(0, 0, (0, 1), range(4), near_copies=(2,))
    run.answer(0, 1, (1, 2), range(4, 9))
    check_made_for(run.folder, {"dataset": DIGEST})
    return run


def taking(whole: RunFolder, **settings: object) -> TrainerConfig:
    """Of a run beside the one with the pool, which takes it over."""
    plain = {"dataset": whole.config.dataset, "runs_dir": whole.folder.parent, "run": "second", "mode": "offline"}
    return TrainerConfig.model_validate(plain | {"pool_from": whole.folder} | settings)


def each(number: int) -> dict[str, object]:
    return {"feedback": {"images_per_sample": number}}


@pytest.fixture
def whole(made: RunFolder) -> RunFolder:
    made.answer(0, 2, (2, 3), [9], failed=True)
    return made


def test_what_is_in_it(whole: RunFolder, capsys: pytest.CaptureFixture[str]):
    found = ready_made.contents(whole.folder)
    assert (found.run, found.sources, found.per_source, found.failed, found.near_copies) == ("first", 10, 2, 2, 1)
    assert found.whole and found.classes == {"cat": 10, "dog": 8} and found.weights == {"prior@1 (d)": 18}
    assert ready_made.main([str(whole.folder)]) == 0
    assert "made by prior@1 (d): 18" in capsys.readouterr().out


@pytest.mark.parametrize("links", [True, False])
def test_it_is_taken_over_once_and_outlives_the_other_run(
    whole: RunFolder, tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch
):
    if not links:

        def refuse(*_: object) -> None:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

        monkeypatch.setattr(os, "link", refuse)
    expected = images(Pool(whole.folder / "batches").everything())
    own = tmp_path / "runs" / "second"
    for _ in range(2):  # the second time, it is there
        ready_made.take_over(taking(whole, **each(2)), DIGEST)
        whole.folder.rename(whole.folder.with_name("gone")) if whole.folder.exists() else None
    assert os.stat(own / "batches" / "000000-000000.safetensors").st_nlink == (2 if links else 1)
    pool = Pool(own / "batches")
    assert pool.complete(0) and len(pool.everything()) == 18
    assert all(np.array_equal(a, b) for a, b in zip(images(pool.everything()), expected, strict=True))
    assert {path.name for path in own.iterdir()} == {"batches", "accepted", "feedback"}


def test_what_adapting_its_weights_took_comes_along(whole: RunFolder, tmp_path: Path):
    write_adaptation(whole.folder, {"base@1": 50.0, "prior@1": 36.0, "later@2": 9.0})
    first, later = Record.open(whole.folder).batches[0], WeightsRef(name="later", version=2, digest="d")
    samples = [first.samples[0].model_copy(update={"id": "other", "weights": later})]
    asked_later = first.model_copy(update={"feedback": 1, "weights": later, "samples": samples})
    (whole.folder / "batches" / "000001-000000.json").write_text(asked_later.model_dump_json())
    ready_made.take_over(taking(whole), DIGEST)
    own = tmp_path / "runs" / "second"
    assert read_adaptation(own) == {"base@1": 50.0, "prior@1": 36.0}  # the pool's, and what they were made from
    write_adaptation(own, {"later@3": 1.0})  # what the run itself learns comes to it
    assert read_adaptation(own) == {"base@1": 50.0, "prior@1": 36.0, "later@3": 1.0}


def test_one_cut_short_is_taken_over_whole(whole: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    own, copy = tmp_path / "runs" / "second", ready_made._copy

    def crash(path: Path, target: Path) -> None:
        if target.parent.name == "feedback":
            raise KeyboardInterrupt
        copy(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ready_made, "_copy", crash)
        ready_made.take_over(taking(whole), DIGEST)
    ready_made.take_over(taking(whole), DIGEST)
    assert (own / "feedback" / "000000.json").exists() and Pool(own / "batches").complete(0)


def test_pools_that_do_not_fit(made: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    own = tmp_path / "runs" / "second"
    with pytest.raises(ConfigError, match="is not whole"):
        ready_made.take_over(taking(made), DIGEST)
    made.answer(0, 2, (2, 3), [9])
    with pytest.raises(ConfigError, match="is for other real samples"):
        ready_made.take_over(taking(made), "others")
    with pytest.raises(ConfigError, match="has 2 images of each real sample, and 5 are wanted: set trainer"):
        ready_made.take_over(taking(made, **each(5)), DIGEST)
    with pytest.raises(ConfigError, match="and 1 are wanted: name a run of mode synthetic") as caught:
        ready_made.take_over(taking(made, mode="synthetic"), DIGEST)
    assert "images_per_sample" not in caught.value.message
    assert not own.exists()

    live = RunFolder(tmp_path / "runs" / "live", made.dataset, made.config.dataset)
    live.ask(0, range(3))
    with pytest.raises(ConfigError, match="of mode async and has no pool"):
        ready_made.contents(live.folder)
    assert ready_made.main([str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
