"""The command, whole: synthetic clips of a run or a folder beside real ones, measured by a network whose features are
known."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from agent import cli
from protocol import clips, codec
from protocol import config as settings_file
from protocol.dataset import Dataset, DatasetConfig
from protocol.dataset import sample_id as id_of
from tests.trainer.video_quality import networks
from tests.trainer.video_quality.batches import batch, sample
from trainer import record
from trainer.settings import TrainerConfig, VideoMeasureConfig
from trainer.video_quality.__main__ import main
from trainer.video_quality.frechet import frechet_distance
from trainer.video_quality.subject import compared, trained_on


def clip(seed: int, frames: int = 5, size: int = 8) -> np.ndarray:
    generator = np.random.default_rng(seed)
    base = generator.integers(60, 190, 3)
    return np.clip(base + 8 * np.arange(frames)[:, None, None, None] + np.zeros((1, size, size, 1)), 0, 255).astype(
        np.uint8
    )


def write_clips(folder: Path, labels: list[str], subjects: list[str] | None, first: int = 0) -> Path:
    folder.mkdir(parents=True)
    lines = []
    for row, label in enumerate(labels):
        name = f"{row:03d}.webp"
        (folder / name).write_bytes(clips.to_bytes(clip(first + row)))
        told = {"subject": subjects[row]} if subjects else {}
        lines.append({"file_name": name, "label": label, **told})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def features(seeds: list[int]) -> torch.Tensor:
    """What `networks.Moments` makes of clips by their seeds, of two frames each."""
    rows = []
    for seed in seeds:
        x = 2 * torch.from_numpy(clip(seed)[clips.spread(5, 2)]).float() / 255 - 1
        rows.append(torch.cat([x.mean(dim=(0, 1, 2)), (x[-1] - x[0]).mean(dim=(0, 1))]))
    return torch.stack(rows)


@pytest.fixture
def network(tmp_path: Path) -> list[str]:
    file = networks.script(networks.Moments(), tmp_path / "moments.pt")
    return ["--features", f"torchscript:{file}", "--frames", "2", "--size", "8"]


def test_two_folders_are_compared_on_the_classes_that_were_made(tmp_path: Path, network: list[str], capsys):
    real = write_clips(tmp_path / "real", ["fear"] * 3 + ["joy"] * 3 + ["sad"] * 2, ["s", "s", "t", "s", "t", "t"] * 2)
    made = write_clips(tmp_path / "made", ["fear"] * 3 + ["joy"] * 2, ["s", "s", "t", "t", "t"], first=50)
    perceptual = ["--diversity", f"timm:local-dir:{networks.timm_folder(tmp_path / 'net')}", "--pairs", "2"]
    arguments = ["--made", str(made), "--real", str(real), *network, *perceptual, "--batch-size", "2"]
    assert main([*arguments, "--size", "32", "--out", str(tmp_path / "found.json"), "--device", "cpu"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    found = json.loads((tmp_path / "found.json").read_text())
    quality = found["quality"]
    generated, others = features([50, 51, 52, 53, 54]), features([0, 1, 2, 3, 4, 5])  # without the sad
    assert quality["fvd"] == pytest.approx(frechet_distance(generated, others), abs=1e-6)
    assert quality["tfvd"]["distances"] == pytest.approx(
        {
            "fear": frechet_distance(generated[:3], others[:3]),
            "joy": frechet_distance(generated[3:], others[3:]),
        },
        abs=1e-6,
    )
    by_subject = quality["sfvd"]["distances"]
    assert by_subject["s"] == pytest.approx(frechet_distance(generated[:2], others[[0, 1, 3]]), abs=1e-6)
    assert by_subject["t"] == pytest.approx(frechet_distance(generated[2:], others[[2, 4, 5]]), abs=1e-6)
    assert found["diversity"]["classes"].keys() == {"fear", "joy"} and found["diversity"]["mean"] > 0
    assert "5 synthetic clips, 6 real ones of their classes" in shown
    assert f"FVD {quality['fvd']:.2f}" in shown
    tfvd = quality["tfvd"]
    assert f"tFVD, by class {tfvd['mean']:.2f} ± {tfvd['deviation']:.2f} 2" in shown


def test_what_cannot_be_measured_is_said(tmp_path: Path, network: list[str], capsys: pytest.CaptureFixture[str]):
    real = write_clips(tmp_path / "real", ["fear"] * 2 + ["joy"] * 2, None)
    made = write_clips(tmp_path / "made", ["fear", "joy"], None, first=9)
    assert main(["--made", str(made), "--real", str(real), *network]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "sFVD, by subject - 0" in shown and "sFVD: no clip's group is known" in shown
    assert "tFVD: none of 2 groups has two generated and two real clips" in shown
    assert "tFVD leaves out joy: 1 generated and 2 real clips; it takes two of each" in shown


def test_of_many_groups_some_are_named_and_all_are_written(
    tmp_path: Path, network: list[str], capsys: pytest.CaptureFixture[str]
):
    names = [f"class {letter}" for letter in "abcdefgh"]
    real = write_clips(tmp_path / "real", names * 2, None)
    made = write_clips(tmp_path / "made", names, None, first=16)
    out = tmp_path / "all.json"
    assert main(["--made", str(made), "--real", str(real), *network, "--out", str(out)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("tFVD leaves out class ") == 5 and "tFVD leaves out 3 more for" in shown
    assert json.loads(out.read_text())["quality"]["tfvd"]["left_out"].keys() == set(names)


def write_run(folder: Path, root: Path) -> Path:
    """A run's folder as the trainer leaves it: three clips in two files, one of which it never trained on."""
    config = TrainerConfig(run="r", runs_dir=folder.parent, dataset=DatasetConfig(root=root, layout="clips"))
    (folder / "batches").mkdir(parents=True)
    settings_file.write_resolved({"trainer": config}, folder / "settings.toml")
    samples = []
    for unit, seeds in enumerate(([50, 51], [52])):
        begins_with = id_of(f"{2 + unit:03d}.webp")
        told = [sample("r", 1, seed, 0, "fear", 5, begins_with) for seed in seeds]
        answered, data = batch(told, [clip(seed) for seed in seeds], unit, units=2)
        file = folder / "batches" / f"000001-{unit:06d}.json"
        file.write_text(answered.model_dump_json())
        file.with_suffix(".safetensors").write_bytes(data)
        samples += told
    rows = [{"id": one.id, "iteration": 1, "kept": True, "fate": "trained"} for one in samples]
    rows[1]["fate"] = "near copy"
    (folder / "selection.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    return folder


def test_a_run_is_measured_by_what_it_trained_on_and_subjects_are_those_of_first_frames(
    tmp_path: Path, network: list[str], capsys: pytest.CaptureFixture[str]
):
    root = write_clips(tmp_path / "real", ["fear", "fear", "joy", "joy"], ["a", "b", "b", "c"])
    run = write_run(tmp_path / "r", root)
    assert trained_on(run) == ["made-50", "made-52"] and record.rows(run / "selection.jsonl")
    made, real = compared(run, None, [])
    assert (list(made.texts), list(made.subjects)) == (["fear", "fear"], ["b", "c"])
    assert (list(real.texts), list(real.subjects)) == (["fear", "fear"], ["a", "b"])
    assert np.array_equal(made.read([1], 2)[0], clip(52)[clips.spread(5, 2)])
    assert main(["--made", str(run), *network, "--out", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())["quality"]
    assert found["fvd"] == pytest.approx(frechet_distance(features([50, 52]), features([0, 1])), abs=1e-6)
    other = write_clips(tmp_path / "other", ["fear", "fear", "joy", "sad"], None, first=20)
    settings = tmp_path / "other.toml"
    settings.write_text(f'[generator.dataset]\nroot = "{other}"\nlayout = "clips"\n')
    made, real = compared(run, settings, [])
    assert list(made.subjects) == ["b", "c"] and len(real) == 2
    assert np.array_equal(real.read([1], 5)[0], clip(21))


def test_wrong_arguments_are_told(tmp_path: Path, network: list[str], capsys: pytest.CaptureFixture[str]):
    real = write_clips(tmp_path / "real", ["fear", "joy"], None)
    made = write_clips(tmp_path / "made", ["fear", "anger"], None)
    empty = write_run(tmp_path / "r", real if real.exists() else made)
    (empty / "selection.jsonl").write_text("")
    pictures = tmp_path / "pictures.toml"
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "b").mkdir()
    for name in "ab":
        (tmp_path / "images" / name / "0.png").write_bytes(codec.image_to_bytes(clip(0)[0]))
    pictures.write_text(f'[trainer.dataset]\nroot = "{tmp_path / "images"}"\n')
    for arguments, says in (
        (["--made", str(made), "--real", str(real)], "say what to measure with"),
        (["--made", str(made), *network], "is no run's folder"),
        (
            ["--made", str(made), "--real", str(real), *network],
            "has clips of anger, and the real ones are of fear, joy",
        ),
        (["--made", str(empty), *network], "no synthetic clips that were trained on"),
        (["--made", str(made), "--real", str(pictures), *network], "is about pictures, not clips"),
        (["--made", str(tmp_path / "none"), "--real", str(real), *network], "does not exist"),
        (["--made", str(real), "--real", str(real), *network, "--frames", "0"], "frames"),
    ):
        assert main(arguments) == 2, arguments
        assert says in " ".join(capsys.readouterr().err.split())


def test_the_cli_hands_everything_on(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def ran(command: list[str]) -> SimpleNamespace:
        asked.append(command)
        return SimpleNamespace(returncode=7)

    monkeypatch.setattr("agent.fvd_command.subprocess.run", ran)
    said = ["--made", "runs/r", "--real", "x.toml", "--set", "trainer.dataset.fold=2", "--batch-size", "4"]
    assert cli.main(["fvd", *said, "--features", "torchscript:i3d.pt", "--diversity-weights", "w"]) == 7
    (command,) = asked
    assert command[1:3] == ["-m", "trainer.video_quality"]
    from trainer.video_quality.__main__ import _parser

    options = _parser().parse_args(command[3:])
    assert (str(options.made), str(options.real), options.set) == ("runs/r", "x.toml", ["trainer.dataset.fold=2"])
    assert (options.batch_size, options.features, options.diversity_weights) == (4, "torchscript:i3d.pt", "w")


def test_the_command_and_the_settings_name_the_same():
    from agent.fvd_command import TEXT

    assert {name.replace("-", "_") for name in TEXT} >= set(VideoMeasureConfig.model_fields)


def test_real_clips_can_be_a_folder_of_one_class_too(tmp_path: Path):
    made, real = (write_clips(tmp_path / name, ["fear", "fear"], None) for name in ("made", "real"))
    synthetic, others = compared(made, real, [])
    assert (len(synthetic), len(others)) == (2, 2)
    assert Dataset.open_identities(DatasetConfig(root=real, layout="clips")).is_clips
