"""The report's section on synthetic clips: the numbers of the last line, beside those of other runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from protocol.dataset import Dataset, DatasetConfig
from tests.trainer.run_folder import RunFolder, write_dataset
from trainer.record import Record
from trainer.report import clip_quality
from trainer.report.page import page


@pytest.fixture
def data(tmp_path: Path) -> DatasetConfig:
    write_dataset(tmp_path / "data")
    return DatasetConfig(root=tmp_path / "data", split="train")


def measured(fvd: float | None, mean: float | None, deviation: float | None) -> dict:
    groups = {"mean": mean, "deviation": deviation, "distances": {}, "left_out": {"<b>": "why"}, "unassigned": 0}
    return {
        "fvd": fvd,
        "sfvd": {**groups, "note": None},
        "tfvd": {**groups, "mean": None, "deviation": None, "left_out": {}, "note": "none"},
        "fvd_features": "torchscript:<i3d>.pt",
        "diversity": {"network": "timm:x", "mean": 0.3456, "classes": {"<fear>": 0.357}, "left_out": []},
    }


def record(folder: Path, data: DatasetConfig, **more: object) -> Record:
    run = RunFolder(folder, Dataset.open(data), data, mode="real")
    run.finish(0, **more)
    return Record.open(folder)


def test_distances_and_diversity_stand_beside_those_of_other_runs(tmp_path: Path, data: DatasetConfig):
    own = record(tmp_path / "run", data, **measured(1234.5, 133.62, 50.94))
    other = record(tmp_path / "other", data, **measured(170.16, 345.16, None))
    plain = record(tmp_path / "plain", data)
    text = clip_quality.section(own, [other, plain])
    assert text is not None
    lines = {
        row[0]: row[1:]
        for row in (re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line) for line in re.findall(r"<tr>.*?</tr>", text))
    }
    absent = "\N{EN DASH}"
    assert lines["FVD"] == ["170.16", absent, "1,234.50"]
    assert lines["sFVD, by subject"] == ["345.16", absent, "133.62 ± 50.94"]
    assert lines["tFVD, by class"] == [absent] * 3
    assert lines["Diversity"] == ["0.346", absent, "0.346"]
    assert lines["Diversity of &lt;fear&gt;"] == ["0.357", absent, "0.357"]
    assert "in the features of torchscript:&lt;i3d&gt;.pt" in text and "sFVD leaves out 1 groups" in text
    assert "tFVD leaves out" not in text and "<fear>" not in text
    assert "How good the synthetic clips are" in page(own, [other])
    assert clip_quality.section(plain, [own]) is None and "How good the synthetic clips" not in page(plain)
