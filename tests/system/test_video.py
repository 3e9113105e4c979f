"""Clips through a whole run: a pool of them is taken over, filtered, trained on, resumed and reported."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from protocol import codec
from protocol import config as settings_file
from protocol.bus import QueueConfig
from protocol.dataset import Dataset, DatasetConfig
from protocol.entries import Sample, SampleBatch
from protocol.errors import ConfigError
from protocol.messages import FeedbackAccepted, class_source, sample_id, seed_of
from protocol.video import GuidanceCurve
from tests.trainer.clip_folders import moving, write_clips
from tests.trainer.run_folder import WEIGHTS
from trainer import books
from trainer.durable import write_durably
from trainer.folder import check_made_for
from trainer.loop import train
from trainer.pool import Pool
from trainer.record import Record
from trainer.report import paper
from trainer.report.page import page
from trainer.run import Run
from trainer.settings import TrainerConfig
from trainer.shortages import before_training
from trainer.source import RealSamples, Wanted, question
from trainer.start import open_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EACH = {"left": 10, "right": 10, "down": 2}
MODEL = {"model": "small_cnn", "image_size": 16, "frames": 5, "hidden": 16, "flip": False, "shift": 1}


def config(folder: Path, data: DatasetConfig, name: str, **settings: object) -> TrainerConfig:
    plain = {
        "run": name,
        "runs_dir": folder / "runs",
        "device": "cpu",
        "threads": 1,
        "dataset": data,
        "task": "video",
        "model": MODEL,
        "mode": "offline",
        "iterations": 4,
        "warmup_iterations": 2,
        "epochs": 1,
        "batch_size": 8,
        "gradient_rows": 2,
        "optimizer": {"learning_rate": 0.02},
        "feedback": {"images_per_sample": 1, "fraction": 0.3, "scarcity": {"enabled": True, "clips": 6, "recall": 1.0}},
        "drop_near_copies": True,
        "privacy": {"filter": True, "quantile": 0.01},
    }
    return TrainerConfig.model_validate(plain | settings)


def write_pool(config: TrainerConfig, dataset: Dataset, frames: int = 8, side: int = 24) -> None:
    """What a service would have made: a clip for each real one, and some for the rare class; two near copies."""
    everything, short = range(len(dataset)), before_training(config, dataset)
    asked = question(config, RealSamples(dataset, False), 0, 0, Wanted(everything, [0.0] * len(everything), short))
    sources = [(entry.sample_id, entry.label, entry.class_name, 0) for entry in asked.samples]
    for one in asked.classes:
        source = class_source(one.class_name)
        sources += [(source, one.label, one.class_name, index) for index in range(one.images)]
    samples, pixels = [], []
    for row, (source, label, name, index) in enumerate(sources):
        pixels.append(moving(name, 5000 + row, frames, side))
        samples.append(_sample(config.run, source, label, name, index, row))
    batch = {
        "unit_id": f"{config.run}.0.0.{asked.fingerprint()}",
        "run": config.run,
        "feedback": 0,
        "unit": 0,
        "units": 1,
    }
    batch |= {"model_version": 0, "weights": WEIGHTS, "samples": samples, "blob": None, "worker": "w"}
    made = SampleBatch(**batch, started=1.0, finished=2.0)
    assert Pool(config.folder / "batches").admit(made, codec.encode({"images": np.stack(pixels)}))
    promise = FeedbackAccepted(run=config.run, feedback=0, units=1, samples=len(samples), weights=WEIGHTS)
    for folder, message in (("feedback", asked), ("accepted", promise)):
        (config.folder / folder).mkdir()
        write_durably(config.folder / folder / "000000.json", message.model_dump_json().encode())
    check_made_for(config.folder, {"dataset": dataset.digest()})
    settings_file.write_resolved({"trainer": config}, config.folder / "settings.toml")


def _sample(run: str, source: str, label: int, name: str, index: int, row: int) -> Sample:
    own = sample_id(run, 0, source, index)
    return Sample(
        id=own,
        run=run,
        feedback=0,
        model_version=0,
        source_id=source,
        index=index,
        seed=seed_of(own),
        label=label,
        class_name=name,
        prompt=f"a square that moves {name}",
        prompt_by="template",
        guidance_scale=9.0,
        guidance=GuidanceCurve(a=3.0) if row % 2 else None,
        steps=10,
        scheduler="ddim",
        strength=1.0,
        frames=8,
        fps=8.0,
        policy=bool(row % 2),
        action_units=["AU01", "AU26"],
        weights=WEIGHTS,
        created=1.0,
        nearest_real=source if row < 2 else None,
        nearest_distance=0.01 if row < 2 else None,
        near_copy=row < 2,
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DatasetConfig:
    root = tmp_path_factory.mktemp("clips")
    write_clips(root, {"left": 4, "right": 4, "down": 4}, split="test", seed=900)
    return write_clips(root, EACH)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data: DatasetConfig) -> Run:
    folder = tmp_path_factory.mktemp("whole")
    write_pool(config(folder, data, "pool"), Dataset.open(data))
    with open_run(config(folder, data, "run", pool_from=folder / "runs" / "pool"), QueueConfig()) as (run, source):
        train(run, source)
    return run


def test_what_is_hard_and_what_is_scarce_is_trained_on(finished: Run):
    record = Record.open(finished.config.folder)
    for iteration in (2, 3):
        rows = [row for row in record.selection if row["iteration"] == iteration]
        sources = {sample.id: sample.source_id for sample in record.samples()}
        of_class = [row for row in rows if sources[row["id"]] == "class:down"]
        assert len(of_class) == 6 and len(rows) == 6 + 7  # the hardest 30 % of 22 real clips, one sample of each
        assert record.metrics[iteration]["scarce"] == ["down"] and record.metrics[iteration]["synthetic_rows"] > 0
        assert {row["fate"] for row in rows} <= {"trained", "vog", "near copy", "privacy"}
        dropped = [row for row in rows if row["fate"] == "vog"]
        assert dropped and all(row["vog"] >= 0 for row in dropped)
    last = record.metrics[-1]
    assert last["headline"] == "test_uar" and np.sum(last["confusion"]) == 12 and last["test_uar"] == last["test_war"]
    assert last["gradient_synthetic"] > 0 and "corrupted" not in last
    assert books.open_books(finished.config.folder).balanced


def test_a_pool_without_a_class_that_is_named_is_refused(tmp_path: Path, data: DatasetConfig, finished: Run):
    named = {"feedback": {"images_per_sample": 1, "scarcity": {"enabled": True, "classes": ["down", "left"]}}}
    settings = config(tmp_path, data, "run", pool_from=finished.config.pool_from, **named)
    with pytest.raises(ConfigError, match="has no samples of scarce classes left"), open_run(settings, QueueConfig()):
        pass


@pytest.mark.parametrize("mode", ["offline", "async"])
def test_a_run_that_would_ask_for_nothing_is_refused(tmp_path: Path, data: DatasetConfig, mode: str):
    nothing = {"feedback": {"enabled": False, "scarcity": {"enabled": True, "part": 0.01}}}
    with (
        pytest.raises(ConfigError, match=r"no class is less than 0\.01 of the dataset"),
        open_run(config(tmp_path, data, "run", mode=mode, **nothing), QueueConfig()),
    ):
        pass


def test_a_run_that_stops_goes_on_as_if_it_had_not(tmp_path: Path, data: DatasetConfig, finished: Run):
    class Stop(Exception):
        pass

    def stop(run: Run) -> None:
        if run.at.iteration == 3 and run.at.done == 2:
            raise Stop

    settings = config(tmp_path, data, "run", pool_from=finished.config.pool_from, checkpoint_every=1)
    with pytest.raises(Stop), open_run(settings, QueueConfig()) as (run, source):
        train(run, source, stop)
    with open_run(settings, QueueConfig()) as (run, source):
        assert run.at.iteration == 3 and run.synthetic.images.shape[1:] == (5, 16, 16, 3)
        train(run, source)
    for name, value in finished.model.state_dict().items():
        assert torch.equal(run.model.state_dict()[name], value), name


@pytest.fixture(scope="module")
def report(finished: Run) -> str:
    """t-SNE takes seconds; the first two components stand in for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paper, "_tsne", lambda components: components[:, :2])
        return page(Record.open(finished.config.folder))


def test_clips_play_in_the_report(report: str):
    for said in ("What is recognised", "UAR", "down (scarce)", "Scarce classes and what was made for them"):
        assert said in report
    assert "6 were asked for as samples of scarce classes: down 6" in report
    assert "AU01+AU26, 10 steps, guidance 7 to 11, a = 3, b = 2, policy" in report
    assert "a square that moves down" in report and "AU01+AU26, 10 steps, guidance 9" in report
    assert report.count('src="data:image/webp;base64,') > 10 and 'src="data:image/png' not in report
    assert not re.search(r'(src|srcset)="(?!data:)', report)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser of playwright's."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: nothing plays")
    if CHROMIUM is None:
        pytest.skip("no chromium on PATH: nothing plays")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def moves(tab: Any, longest_s: float) -> bool:
    """Whether the page's first clip is ever seen otherwise."""
    clip = tab.locator("picture img").first
    clip.scroll_into_view_if_needed()
    assert clip.evaluate("image => image.decode().then(() => [image.naturalWidth, image.naturalHeight])") == [16, 16]
    seen, deadline = {clip.screenshot()}, time.monotonic() + longest_s
    while len(seen) == 1 and time.monotonic() < deadline:
        tab.wait_for_timeout(100)
        seen.add(clip.screenshot())
    return len(seen) > 1


def test_clips_move_in_a_browser_unless_it_is_asked_for_less(chromium: Any, tmp_path: Path, report: str):
    (tmp_path / "report.html").write_text(report)
    with chromium.new_context(reduced_motion="no-preference") as context:
        tab = context.new_page()
        tab.goto(f"file://{tmp_path / 'report.html'}")
        assert moves(tab, 30.0)
        tab.emulate_media(reduced_motion="reduce")
        tab.reload()
        assert not moves(tab, 1.5)
