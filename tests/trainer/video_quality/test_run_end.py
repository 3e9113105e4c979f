"""What a run on clips writes at its end of the synthetic clips that it trained on."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from protocol import clips
from protocol.bus import QueueConfig
from protocol.dataset import sample_id
from protocol.errors import ConfigError
from protocol.messages import ClassShortage, Feedback
from tests.trainer.clip_folders import FRAMES, moving, write_clips
from tests.trainer.video_quality import networks
from tests.trainer.video_quality.batches import batch, sample
from trainer import measure, start, summary
from trainer.loop import train
from trainer.record import rows
from trainer.run import Run
from trainer.settings import TrainerConfig
from trainer.start import open_run
from trainer.video_quality.frechet import frechet_distance

TINY = {"model": "small_cnn", "image_size": 8, "frames": 4, "hidden": 8, "heads": 2}


def config(tmp_path: Path, **video: object) -> TrainerConfig:
    data = write_clips(tmp_path / "data", {"left": 4, "right": 3, "down": 3})
    return TrainerConfig.model_validate(
        {
            "run": "run",
            "runs_dir": tmp_path,
            "dataset": data,
            "test_split": "",
            "task": "video",
            "model": TINY,
            "mode": "real",
            "device": "cpu",
            "iterations": 1,
            "epochs": 1,
            "batch_size": 4,
            "gradient_rows": 0,
            "measure": {"features_per_class": 0, "video": {"frames": 2, "size": 8, **video}},
        }
    )


def made(seed: int) -> np.ndarray:
    return moving("left", seed)


def admit(run: Run, seeds: list[int]) -> None:
    """Synthetic clips of class left, as if the run had asked for them and trained on all but the last."""
    label = run.splits.dataset.classes.index("left")
    begins_with = sample_id("train/right/000")
    samples = [sample("run", 0, seed, label, "left", FRAMES, begins_with) for seed in seeds]
    answered, data = batch(samples, [made(seed) for seed in seeds])
    assert run.pool is not None and run.pool.admit(answered, data)
    fates = ["trained"] * (len(seeds) - 1) + ["near copy"]
    with (run.config.folder / "selection.jsonl").open("a") as file:
        for one, fate in zip(samples, fates, strict=True):
            file.write(json.dumps({"id": one.id, "iteration": 0, "kept": fate == "trained", "fate": fate}) + "\n")


def features(arrays: list[np.ndarray]) -> torch.Tensor:
    """As `networks.Moments` sees two frames of each at 8 pixels a side, found another way: sides of 16 by halves."""
    found = []
    for array in arrays:
        frames = [
            Image.fromarray(array[index]).resize((8, 8), Image.Resampling.BICUBIC) for index in clips.spread(5, 2)
        ]
        x = 2 * torch.from_numpy(np.stack([np.asarray(frame) for frame in frames])).float() / 255 - 1
        found.append(torch.cat([x.mean(dim=(0, 1, 2)), (x[-1] - x[0]).mean(dim=(0, 1))]))
    return torch.stack(found)


def test_the_last_line_has_the_distances_of_the_clips_trained_on(tmp_path: Path):
    network = networks.script(networks.Moments(), tmp_path / "moments.pt")
    perceptual = f"timm:local-dir:{networks.timm_folder(tmp_path / 'net')}"
    settings = config(tmp_path, features=f"torchscript:{network}", diversity=perceptual)
    with open_run(settings, QueueConfig()) as (run, source):
        admit(run, [7, 8, 9, 10])
        asked = Feedback(
            run="run",
            feedback=0,
            model_version=0,
            samples=[],
            classes=[ClassShortage(label=1, class_name="left", images=4)],
        )
        (settings.folder / "feedback").mkdir(exist_ok=True)
        (settings.folder / "feedback" / "000000.json").write_text(asked.model_dump_json())
        train(run, source)
    (line,) = rows(settings.folder / "metrics.jsonl")
    real = features([moving("left", seed) for seed in range(4)])
    expected = frechet_distance(features([made(7), made(8), made(9)]), real)
    assert line["fvd"] == pytest.approx(expected, rel=1e-3)
    assert line["tfvd"]["distances"] == {"left": line["fvd"]} and line["tfvd"]["mean"] == line["fvd"]
    assert line["sfvd"]["mean"] is None and line["sfvd"]["note"] == "no clip's group is known"
    assert line["fvd_features"] == settings.measure.video.features
    assert line["diversity"]["classes"].keys() == {"left"} and line["diversity"]["mean"] > 0
    told = summary.summarise(settings.folder)
    assert (told.fvd, told.tfvd, told.sfvd) == (line["fvd"], line["fvd"], None)
    assert (told.diversity, told.scarce) == (line["diversity"]["mean"], {"left": 1})


def test_nothing_is_measured_where_no_network_is_named_or_nothing_was_made(tmp_path: Path):
    with open_run(config(tmp_path), QueueConfig()) as (run, _):
        admit(run, [7, 8, 9])
        assert measure.video_quality(run) == {}
    other = config(tmp_path / "other", features="torchscript:nowhere.pt")
    with open_run(other, QueueConfig()) as (run, source):
        train(run, source)
    (line,) = rows(other.folder / "metrics.jsonl")
    assert "fvd" not in line and summary.summarise(other.folder).fvd is None


def test_a_network_that_is_missing_is_told_before_a_run_and_loses_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    settings = config(tmp_path, features="torchscript:nowhere.pt")
    with pytest.raises(ConfigError, match="no TorchScript file nowhere"):
        start.check(settings)
    with open_run(settings, QueueConfig()) as (run, source), caplog.at_level(logging.WARNING, "trainer"):
        admit(run, [7, 8, 9])
        train(run, source)
    assert len(rows(settings.folder / "metrics.jsonl")) == 1
    assert "is not measured: there is no TorchScript file" in caplog.text
    assert f"python -m trainer.video_quality --made {settings.folder}" in caplog.text
