"""`onthefly ablate`, whole: broker, service and trainers; with an arm that is done already, and one that fails."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import pytest
import tomli_w

from agent import machine, recipes
from agent.ablate import ablate
from agent.ablation import grid
from agent.ablation.runs import Bench
from agent.ablation.table import Table
from protocol import config
from protocol.errors import ConfigError
from tests.system.whole import trainer_config
from trainer.record import Record

OURS, BASELINE = "gendataagent-0", "real-only-0"


@pytest.fixture
def settings(tmp_path: Path, checkpoint: Path, data: Path) -> Path:
    """A recipe of a few seconds. Its asynchronous arm is one that the trainer refuses: it would start too early."""
    small = {"iterations": 3, "epochs": 1, "measure": {"corruptions": [], "features_per_class": 0}}
    trainer = trainer_config(tmp_path, data, "", max_staleness=3, feedback={"fraction": 0.5}, **small)
    plain = trainer.model_dump(mode="json", exclude_none=True, exclude={"runs_dir", "run", "test_split"})
    tables = {
        "recipe": {"paper": "Pets"},
        "generator": {"threads": 1, "dit": {"checkpoint": str(checkpoint), "device": "cpu"}},
        "agent": {"steps": 2, "unit_size": 8, "adapt": {"name": "mine", "steps": 1, "batch_size": 4, "activate": True}},
        "trainer": plain,
    }
    for split in ("train", "test"):
        (tmp_path / "split" / split).parent.mkdir(exist_ok=True)
        (tmp_path / "split" / split).symlink_to(data)
    tables["trainer"]["dataset"] = {"root": str(tmp_path / "split"), "split": "train", "links_to": [str(data)]}
    path = tmp_path / "tiny.toml"
    path.write_text(tomli_w.dumps(tables))
    return path


TABLES = {"modes": Table("modes", (("asynchronous", "async"), ("synchronous", "sync")))}


def finish_baseline(settings: Path, folder: Path) -> None:
    """As if an ablation had been stopped just after it."""
    bench = Bench.of(settings, [], folder, 0)
    (folder / BASELINE).mkdir(parents=True)
    bench.note_begun(BASELINE, grid.arms(config.load(settings))["real-only"])
    accuracy = {"test_top1": 0.25, "worst_case_disparity": 0.5}
    books = {"iterations": 3, "iterations_planned": 3, "dead": 0, "outstanding": 0, "device_hours": {"train": 1.0}}
    (folder / BASELINE / "summary.json").write_text(json.dumps(accuracy | books))


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_an_ablation_goes_on_with_the_arms_that_are_not_done_and_one_that_fails_stops_no_other(
    tmp_path: Path, settings: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    out, folder = tmp_path / "ablation", tmp_path / "ablation" / "seed-0"
    finish_baseline(settings, folder)
    assert ablate(settings, [], TABLES, [0], out) == 1
    said = capfd.readouterr().err
    assert said.count("adapted: weights mine@1") == 1
    assert [line for line in said.splitlines() if "training: " in line] == [
        "training: async-0",
        "training: gendataagent-0",
    ]
    failed, sync = json.loads((out / "ablation.json").read_text())["tables"]["modes"]["rows"]
    assert "max_staleness must not exceed warmup_iterations" in failed["failed"]["0"]
    assert "asynchronous, seed 0: failed" in (out / "ablation.md").read_text()
    assert (failed["score"], sync["missing"]) == (None, 0)
    ours = json.loads((folder / OURS / "summary.json").read_text())
    assert ours["trained"] > 0
    assert sync["score"]["mean"] == ours["test_top1"]
    assert sync["gain"]["mean"] == pytest.approx(ours["test_top1"] - 0.25)
    assert sync["hours"]["adaptation"] > 0 < sync["hours"]["generation"]

    monkeypatch.setattr(machine, "machine", lambda *_: pytest.fail("what is done was begun again"))
    done = {"modes": Table("modes", TABLES["modes"].rows[1:])}
    assert ablate(settings, [], done, [0], out) == 0
    assert json.loads((out / "ablation.json").read_text())["tables"]["modes"]["rows"] == [sync]
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == [OURS, BASELINE]  # none is set aside


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_rewards_of_figure_5_are_arms_each_with_a_generator_of_its_own(tmp_path: Path, settings: Path):
    tune = {
        "name": "tuned",
        "steps": 2,
        "activate": True,
        "features": "timm:test_resnet",
        "features_size": 32,
        "pretrained": False,
        "rollout": {"identities": 2, "samples": 2, "denoising_steps": 3, "batch_size": 4},
        "guard": {"kl_ceiling": 1e6, "diversity_floor": 0.0},
    }
    tables = tomllib.loads(settings.read_text())
    tables["agent"] |= {"init": False, "tune": tune}
    tables["recipe"]["paper"] = "CASIA"
    settings.write_text(tomli_w.dumps(tables))
    out, every = tmp_path / "ablation", grid.TABLES["figure-5"]
    finish_baseline(settings, out / "seed-0")
    rows = [row for row in every.rows if row[1] in ("base-dit", "reward-semantic", "ours")]
    assert ablate(settings, [], {"figure-5": Table(every.title, tuple(rows))}, [0], out) == 0
    result = json.loads((out / "ablation.json").read_text())
    assert [row["arm"] for row in result["tables"]["figure-5"]["rows"]] == ["base-dit", "reward-semantic", "ours"]
    assert all(row["score"]["n"] == 1 and row["missing"] == 0 for row in result["tables"]["figure-5"]["rows"])
    made = {arm: {str(s.weights) for s in Record.open(out / "seed-0" / f"{arm}-0").samples()} for _, arm in rows}
    assert made == {"base-dit": {"mine@1"}, "reward-semantic": {"tuned@1"}, "ours": {"tuned@2"}}
    text = (out / "ablation.md").read_text()
    assert "## Figure 5: components" in text and "| 75.65 |" in text
    assert ElementTree.parse(out / "figure-5.svg").getroot().tag.endswith("svg")


def test_a_wrong_recipe_is_told_before_anything_is_started(tmp_path: Path, settings: Path):
    settings.write_text(settings.read_text().replace("[trainer]", "[trainer]\nepoch = 3", 1))
    with pytest.raises(ConfigError, match="did you mean 'epochs'"):
        ablate(settings, [], TABLES, [0], tmp_path / "ablation")


def test_a_recipe_stands_in_for_a_settings_file(tmp_path: Path):
    for command in ("up", "train", "ablate"):
        root = f"trainer.dataset.root={tmp_path / 'nowhere'}"
        arguments = [
            sys.executable,
            "-m",
            "agent.cli",
            command,
            "--recipe",
            "pets",
            "--set",
            root,
            "--set",
            "trainer.x=1",
        ]
        result = subprocess.run(arguments, capture_output=True, text=True)
        assert result.returncode == 2
        assert "trainer.x: unknown key" in result.stderr and str(recipes.find("pets")) in result.stderr
