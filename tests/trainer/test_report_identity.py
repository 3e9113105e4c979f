"""The report of runs on identities, of weights that change meanwhile, and the picture of real, erased and synthetic."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from protocol.dataset import Dataset, DatasetConfig
from protocol.messages import WeightsRef
from tests.trainer.run_folder import RunFolder, write_dataset, write_run
from tests.trainer.test_report import Page, bars, read
from trainer.metrics import feature_file, features
from trainer.record import Record
from trainer.report import distribution, identity, versions
from trainer.summary import summary_of

HELD_OUT = dict.fromkeys(("test_top1", "per_class", "worst_case_disparity", "train_val_gap"), "absent")


@pytest.fixture
def data(tmp_path: Path) -> DatasetConfig:
    write_dataset(tmp_path / "data")
    return DatasetConfig(root=tmp_path / "data", split="train")


def retrieved(at: float) -> dict[str, object]:
    """What a run of task reid measures."""
    cmc = [at + 0.05, at + 0.1, *[at + 0.15] * 48]
    told = {"headline": "mAP", "mAP": at, "rank1": cmc[0], "rank5": cmc[4], "rank10": cmc[9], "cmc": cmc}
    return HELD_OUT | told | {"queries": 40, "queries_without_match": 2}


def identities(folder: Path, data: DatasetConfig, at: float, **settings: object) -> RunFolder:
    run = RunFolder(folder, Dataset.open(data), data, task="reid", **settings)
    for iteration in range(4):
        run.trainer("train", iteration, iteration + 1, iteration)
        run.finish(iteration, **retrieved(at + 0.02 * iteration))
    return run


# ---------------------------------------------------------------- headlines


def test_a_run_on_identities_is_told_by_its_map(tmp_path: Path, data: DatasetConfig):
    run, baseline = identities(tmp_path / "ours", data, 0.5), identities(tmp_path / "real", data, 0.4, mode="real")
    parsed = read(run, baseline)
    rows = {cells[0]: cells[1:] for cells in parsed.cells}
    assert rows["mAP, held out"] == ["46.0 %", "56.0 %"]
    assert rows["Best of any iteration"] == ["46.0 %", "56.0 %"]
    assert rows["Rank-1"] == ["51.0 %", "61.0 %"]
    assert rows["Rank-5"] == ["61.0 %", "71.0 %"]
    assert "Top-1 accuracy, held out" not in rows and "Worst class over best class" not in rows
    assert "+10.0 points against real" in parsed.text
    assert "Who is recognised" in parsed.text
    assert "Robustness" not in parsed.text and "No test split was evaluated" not in parsed.text
    assert "40 queries" in parsed.text and "2 more have no match" in parsed.text
    assert (summary_of(Record.open(run.folder)).rank1, summary_of(Record.open(run.folder)).headline) == (
        pytest.approx(0.61),
        "mAP",
    )


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ({}, "40 queries, pictures by a query's own camera passed over; 2 more have no match that another camera took"),
        ({"camera_exclusion": False}, "40 queries, whatever camera took a picture; 2 more have no match, and are left"),
    ],
)
def test_the_protocol_is_told(tmp_path: Path, data: DatasetConfig, model: dict, told: str):
    run = identities(tmp_path / "ours", data, 0.5, model=model)
    assert told in (identity.section(Record.open(run.folder), []) or "")


def test_the_cmc_curve_is_to_scale(tmp_path: Path, data: DatasetConfig):
    chart = identity.cmc([Record.open(identities(tmp_path / "ours", data, 0.5).folder)])
    (line,) = re.findall(r'<path d="([^"]*)"[^>]*stroke: var\(--test\)[^>]*stroke-linecap: square', chart)[:1]
    points = [tuple(map(float, at)) for at in re.findall(r"([-\d.]+) ([-\d.]+)", line)]
    assert len(points) >= 3
    (x1, y1), (x2, y2), (x3, y3) = points[:3]
    assert (x3 - x1) / (x2 - x1) == pytest.approx(2, abs=1e-3)
    assert (y3 - y1) / (y2 - y1) == pytest.approx((0.71 - 0.61) / (0.66 - 0.61), abs=1e-2)


def test_runs_of_another_task_are_not_compared(tmp_path: Path, data: DatasetConfig):
    baseline = RunFolder(tmp_path / "other", Dataset.open(data), data, mode="real")
    baseline.finish(0)
    parsed = read(identities(tmp_path / "ours", data, 0.5), baseline)
    rows = {cells[0]: cells[1:] for cells in parsed.cells}
    assert rows["mAP, held out"] == ["\N{EN DASH}", "56.0 %"]
    assert "points against" not in parsed.text


def test_verification_has_its_sets_and_the_bias_table(tmp_path: Path, data: DatasetConfig):
    pairs = [{"name": "LFW", "layout": "lfw", "root": "/a"}]
    pairs += [{"name": f"RFW {g}", "layout": "rfw", "root": "/a", "group": g} for g in ("Asian", "African")]
    run = RunFolder(tmp_path / "run", Dataset.open(data), data, task="face", model={"pairs": pairs}, mode="real")
    sets = {"LFW": (0.9, 0.01), "RFW Asian": (0.7, 0.02), "RFW African": (0.6, 0.03)}
    told = {
        "headline": "verification",
        "verification": 0.9,
        "verification_sets": {name: {"accuracy": a, "deviation": d} for name, (a, d) in sets.items()},
        "verification_groups": {"Asian": 0.7, "African": 0.6},
        "group_average": 0.65,
        "group_worst": "African",
        "group_best": "Asian",
        "group_gap": 0.1,
    }
    run.finish(0, **HELD_OUT | told)
    parsed = read(run)
    rows = {cells[0]: cells[1:] for cells in parsed.cells}
    assert rows["Verification accuracy, held out"] == ["90.0 %"]
    assert rows["LFW"] == ["90.0 ± 1.0 %"] and rows["Mean"] == ["90.0 %"]
    assert not [label for label in rows if label.startswith("RFW")]
    assert (rows["Asian"], rows["African"]) == (["70.0 %"], ["60.0 %"])
    assert (rows["Average of the groups"], rows["Best minus worst"]) == (["65.0 %"], ["10.0 %"])
    assert "Recognised worst are African, best Asian: 10.0 points apart." in parsed.text


# ---------------------------------------------------------------- weights


@pytest.fixture
def swapped(tmp_path: Path, data: DatasetConfig, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """The run of `write_run`, but feedback 2 is answered by the next version."""
    answer = RunFolder.answer
    later = WeightsRef(name="tuned", version=2, digest="<e>")

    def with_weights(self: RunFolder, feedback: int, *args: object, **more: object) -> None:
        with monkeypatch.context() as patched:
            if feedback == 2:
                patched.setattr("tests.trainer.run_folder.WEIGHTS", later)
            answer(self, feedback, *args, **more)

    monkeypatch.setattr(RunFolder, "answer", with_weights)
    return write_run(tmp_path / "run", Dataset.open(data), data)


def test_samples_are_counted_by_the_weights_that_made_them(swapped: RunFolder):
    first, second = versions.versions(Record.open(swapped.folder))
    assert (str(first.weights), first.arrived, first.trained) == ("prior@1", 10, Counter({2: 5}))
    assert first.dropped == Counter({2: 3, 3: 2})  # near copy and VoG; stale
    assert (str(second.weights), second.arrived, second.trained) == ("tuned@2", 6, Counter({3: 3}))
    assert second.dropped == Counter({3: 1})
    parsed = read(swapped)
    rows = {cells[0]: cells[1:] for cells in parsed.cells}
    assert rows["prior@1"] == ["10", "5", "5", "3"]
    assert rows["tuned@2"] == ["6", "3", "1", "4"]
    assert "2 weight sets made the samples of this run. No batch mixes them: each of the 4 was made" in parsed.text
    assert ("th", "<e>") in [(tag, named.get("title")) for tag, named in parsed.tags]


def test_bars_of_versions_are_to_scale(swapped: RunFolder):
    record = Record.open(swapped.folder)
    chart = versions.chart(record, versions.versions(record))
    heights = []
    for outline in re.findall(r'<path [^>]*d="([^"]*)"[^>]*fill: var\(--synthetic\)', chart):
        ys = [float(y) for y in re.findall(r"[ML] [-\d.]+ ([-\d.]+)", outline)]
        heights.append(max(ys) - min(ys))
    drawn = sorted(height for height in heights if height > 10)  # without empty bars and the legend's swatches
    assert drawn[1] / drawn[0] == pytest.approx(5 / 3, rel=1e-3)
    assert len(bars(chart, "synthetic")) >= 2


def test_a_batch_that_mixes_weights_is_told(swapped: RunFolder):
    path = swapped.folder / "batches" / "000002-000000.json"
    batch = next(b for b in Record.open(swapped.folder).batches if (b.feedback, b.unit) == (2, 0))
    older = WeightsRef(name="tuned", version=1, digest="d")
    samples = [batch.samples[0].model_copy(update={"weights": older}), *batch.samples[1:]]
    path.write_text(batch.model_copy(update={"samples": samples}).model_dump_json())
    assert versions.mixed(Record.open(swapped.folder)) == [batch.unit_id]
    assert f"1 batches mix samples of several weight sets : {batch.unit_id}." in read(swapped).text


# ---------------------------------------------------------------- Figure 4


def spread_out(folder: Path) -> feature_file.FeatureMap:
    """Three classes about centres far apart; erased samples as near as real ones, synthetic ones three times as far."""
    draw = torch.Generator().manual_seed(0)
    centres = 30 * torch.eye(3, 8)
    found, labels = {}, {}
    for kind, far in (("real", 1.0), ("kept", 3.0), ("dropped", 9.0), ("erased", 1.0)):
        around = torch.nn.functional.normalize(torch.randn(3, 12, 8, generator=draw), dim=2)
        around[:, 6:] = -around[:, :6]  # so that a class's centre is the centre
        found[kind] = (centres[:, None] + far * around).flatten(0, 1)
        labels[kind] = torch.arange(3).repeat_interleave(12)
    chosen = labels["erased"] != 2
    found["erased"], labels["erased"] = found["erased"][chosen], labels["erased"][chosen]
    features.write(folder, found, labels)
    read_back = feature_file.read(folder)
    assert read_back is not None
    return read_back


def test_the_globe_shows_the_classes_of_which_some_were_erased(tmp_path: Path):
    found = spread_out(tmp_path)
    chosen = distribution.shown(found)
    assert chosen is not None
    assert np.bincount(chosen.labels).tolist() == [36, 36]
    assert sorted(set(chosen.kinds.tolist())) == [0, 1, 3]  # none that were dropped
    chart = distribution.globe(found)
    assert chart is not None and chart == distribution.globe(found)
    assert [f">{name}<" in chart for name in ("real", "random erasing", "synthetic")] == [True] * 3
    uses = {hue: len(re.findall(rf"<use [^>]*fill: var\(--{hue}\)", chart)) for hue in ("real", "synthetic", "test")}
    assert uses == {"real": 36, "synthetic": 36, "test": 0}  # a colour for each of two classes
    assert "real 1 away, 100 % nearest to their own" in distribution.reading(found)
    assert "random erasing 1 away" in distribution.reading(found)
    assert "synthetic 3 away, 100 % nearest to their own" in distribution.reading(found)


def test_both_feature_maps_stand_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("trainer.report.paper._tsne", lambda components: components[:, :2])
    write_dataset(tmp_path / "three", ("cat", "dog", "elk"))
    data = DatasetConfig(root=tmp_path / "three", split="train")
    run = write_run(tmp_path / "run", Dataset.open(data), data)
    assert "RL-identity, Figure 4. Not measured in this run." in read(run).text
    spread_out(run.folder)
    text = read(run).text
    assert "RL-identity, Figure 4. A colour is a class, 2 at random, placed by DOSNES" in text
    assert "Figure 3. From the centre of their class's real samples, kept synthetic samples are 3.00 times" in text


def test_the_page_of_identities_is_whole(tmp_path: Path, data: DatasetConfig):
    parsed: Page = read(identities(tmp_path / "ours", data, 0.5))
    ids = [named["id"] for _, named in parsed.tags if "id" in named]
    assert len(ids) == len(set(ids))
