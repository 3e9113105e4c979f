from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from protocol.dataset import Dataset, DatasetConfig
from protocol.errors import ConfigError
from tests.trainer.run_folder import RunFolder, write_dataset, write_run
from trainer import summary
from trainer.record import Record, rows
from trainer.summary import intersection, length, overlaps, spans, summarise


@pytest.fixture
def data(tmp_path: Path) -> DatasetConfig:
    write_dataset(tmp_path / "data")
    return DatasetConfig(root=tmp_path / "data", split="train")


def write(tmp_path: Path, data: DatasetConfig, name: str = "run", **settings: object) -> RunFolder:
    return write_run(tmp_path / name, Dataset.open(data), data, **settings)


def test_every_sample_is_accounted_for(tmp_path: Path, data: DatasetConfig):
    made = summarise(write(tmp_path, data).folder)
    assert made.requested == 20
    assert made.generated == 16
    assert (made.failed_units, made.dead, made.outstanding) == (1, 4, 0)
    assert (made.near_copies_flagged, made.near_copies) == (1, 1)
    assert (made.vog_dropped, made.trained, made.stale, made.unused) == (3, 8, 2, 2)
    assert made.balanced is True
    assert (made.lookahead_seen, made.lookahead_kept) == (400, 200)


def test_shares_of_time_by_hand(tmp_path: Path, data: DatasetConfig):
    made = summarise(write(tmp_path, data).folder)
    assert made.wall_s == pytest.approx(40)
    assert made.trainer_idle == pytest.approx(2 / 40)
    # Asked from 12 to 40, at work from 12 to 18, from 21.5 to 30 and from 32 to 34.
    assert made.generator_idle == pytest.approx(1 - (6 + 8.5 + 2) / 28)
    # Trained from 13 to 19, 23 to 29 and 33 to 39.
    assert made.overlap_s == pytest.approx(5 + 6 + 1)


def test_accuracies_are_those_of_the_last_iteration(tmp_path: Path, data: DatasetConfig):
    run = write(tmp_path, data, iterations=5)
    run.finish(4, test_top1=0.7)
    made = summarise(run.folder)
    assert (made.iterations, made.iterations_planned, made.updates) == (5, 5, 200)
    assert (made.test_top1, made.best_test_top1) == (0.7, pytest.approx(0.8))
    assert made.per_class == pytest.approx([0.85, 0.95])
    assert (made.worst_case_disparity, made.train_val_gap) == (0.8, 0.1)


def test_what_the_paper_measures(tmp_path: Path, data: DatasetConfig):
    run = write(tmp_path, data, iterations=5)
    early = summarise(run.folder)
    assert (early.robustness, early.synthetic_top1, early.device, early.caption_fallback) == (None, None, None, None)
    corrupted = {"gaussian_blur": {"1": 0.75, "3": 0.5}, "speckle_noise": {"2": 0.625}}
    run.finish(4, corrupted=corrupted, synthetic_top1=0.5, device="cuda", devices=2)
    made = summarise(run.folder)
    assert made.robustness == {"gaussian_blur": 0.625, "speckle_noise": 0.625}
    assert (made.synthetic_top1, made.device) == (0.5, "cuda")
    assert made.device_hours["train"] == pytest.approx(2 * 24 / 3600)
    # The first iteration was given eight cats and no dog, and cats were the weaker class.
    assert made.count_correlation == pytest.approx(-1.0)
    assert made.prompts_by == {}


@pytest.mark.parametrize("damage", ["lost row", "row twice", "unknown sample", "lost batch", "stale miscounted"])
def test_files_that_disagree_do_not_balance(tmp_path: Path, data: DatasetConfig, damage: str):
    folder = write(tmp_path, data).folder
    selection = (folder / "selection.jsonl").read_text().splitlines(keepends=True)
    if damage == "lost row":
        (folder / "selection.jsonl").write_text("".join(selection[1:]))
    elif damage == "row twice":
        (folder / "selection.jsonl").write_text("".join([*selection, selection[0]]))
    elif damage == "unknown sample":
        forged = json.loads(selection[0]) | {"id": "f" * 32}
        (folder / "selection.jsonl").write_text("".join([json.dumps(forged) + "\n", *selection[1:]]))
    elif damage == "lost batch":
        (folder / "batches" / "000002-000000.json").unlink()
    else:
        metrics = rows(folder / "metrics.jsonl")
        metrics[-1]["stale"] = 4  # as if the two that came after the last iteration had been stale
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    assert summarise(folder).balanced is False


def test_an_offline_pool_is_drawn_again_and_has_no_balance(tmp_path: Path, data: DatasetConfig):
    run = RunFolder(tmp_path / "run", Dataset.open(data), data, mode="offline")
    run.ask(0, range(3))
    run.answer(0, 0, (0, 5), range(3))
    for iteration in (2, 3):
        run.finish(iteration, run.select(iteration, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], dropped=(iteration,)))
    made = summarise(run.folder)
    assert made.balanced is None
    assert made.unused is None
    assert (made.generated, made.requested) == (6, 6)
    assert (made.trained, made.vog_dropped) == (6, 2)  # each of the two dropped was trained on in the other iteration


def test_a_run_on_real_data_has_no_generator(tmp_path: Path, data: DatasetConfig):
    run = RunFolder(tmp_path / "run", Dataset.open(data), data, mode="real", lookahead={"enabled": False})
    run.trainer("train", 0, 9, 0)
    run.finish(0)
    made = summarise(run.folder)
    assert (made.generated, made.requested, made.stale, made.unused) == (0, 0, 0, 0)
    assert made.trainer_idle == 0.0
    assert made.generator_idle is None
    assert made.lookahead_seen is None
    assert made.balanced is True


def test_a_run_that_has_only_begun(tmp_path: Path, data: DatasetConfig):
    made = summarise(RunFolder(tmp_path / "run", Dataset.open(data), data).folder)
    assert (made.iterations, made.iterations_planned) == (0, 4)
    assert made.test_top1 is None
    assert made.wall_s is None
    assert made.trainer_idle is None
    assert made.balanced is True


def test_an_iteration_cut_short_still_balances(tmp_path: Path, data: DatasetConfig):
    folder = write(tmp_path, data).folder
    metrics = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(metrics[:-1]))
    made = summarise(folder)
    assert made.balanced is True
    assert (made.stale, made.unused) == (2, 2)


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path: Path):
    (tmp_path / "trace.jsonl").write_text('{"a": 1}\n{"a": 2}{"a"\n{"a": 3}\n{"a":')
    assert rows(tmp_path / "trace.jsonl") == [{"a": 1}, {"a": 3}]


def test_written_summary_is_the_summary(tmp_path: Path, data: DatasetConfig):
    folder = write(tmp_path, data).folder
    made = summary.write(folder)
    assert summary.Summary.model_validate_json((folder / "summary.json").read_text()) == made == summarise(folder)


def test_a_folder_that_is_no_run_says_which_to_name(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"holds no run .* trainer\.runs_dir/trainer\.run"):
        summarise(tmp_path)


def test_reading_a_run_loads_neither_torch_nor_matplotlib(tmp_path: Path, data: DatasetConfig):
    folder = write(tmp_path, data).folder
    code = (
        "import sys; from pathlib import Path; from trainer import summary; summary.write(Path(sys.argv[1]));"
        "assert not {'torch', 'matplotlib'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)


# ---------------------------------------------------------------- overlaps


def test_overlaps_of_the_run(tmp_path: Path, data: DatasetConfig):
    pairs = overlaps(Record.open(write(tmp_path, data).folder).trace)
    assert sorted((generate["feedback"], generate["unit"], train["iteration"]) for generate, train in pairs) == [
        (1, 0, 1),
        (1, 1, 2),
        (2, 0, 2),
        (2, 1, 2),
        (2, 2, 3),
    ]


def interval(what: str, start: float, end: float) -> dict:
    return {"who": "generator" if what == "generate" else "trainer", "what": what, "start": start, "end": end}


def test_intervals_in_turn_do_not_overlap():
    trace = [interval("train", 2, 3), interval("generate", 1, 2), interval("generate", 3, 4), interval("train", 4, 5)]
    assert overlaps(trace) == []


def test_an_interval_within_another_overlaps_and_others_do_not_count():
    outer, inner = interval("train", 0, 10), interval("generate", 4, 5)
    wait, empty = interval("wait", 0, 10), interval("generate", 6, 6)
    assert overlaps([inner, wait, outer, empty]) == [(inner, outer)]


def test_the_order_decides_not_the_distance():
    first, second = interval("generate", 0, 1.0000001), interval("train", 1.0, 2)
    assert overlaps([second, first]) == [(first, second)]


def test_unions_and_their_intersection():
    joined = spans(
        [interval("train", 4, 6), interval("train", 0, 2), interval("train", 1, 3), interval("train", 3, 3.5)]
    )
    assert joined == [(0, 3.5), (4, 6)]
    assert intersection(joined, [(1, 2), (3, 5), (5.5, 9)]) == [(1, 2), (3, 3.5), (4, 5), (5.5, 6)]
    assert length(joined) == 5.5
