"""The plan of a run: every step in its order, every setting as it would be used, and nothing done."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent import cli, recipes
from agent.dry_run import plan, said
from protocol import config


def planned(recipe: str, *overrides: str) -> dict[str, list[str]]:
    settings = config.load(recipes.find(recipe), ['trainer.dataset.root="/data"', *overrides])
    return dict(plan(settings))


def step(found: dict[str, list[str]], beginning: str) -> tuple[str, list[str]]:
    (match,) = [(title, lines) for title, lines in found.items() if title.startswith(beginning)]
    return match


def test_the_command_checks_and_shows_and_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr("agent.machine._trainer", lambda *arguments: asked.append(arguments))
    monkeypatch.setattr("agent.machine.machine", None)  # whoever starts something calls this
    arguments = ["up", "--recipe", "dfew", "--dry-run", "--replicas", "2", "--set"]
    assert cli.main([*arguments, "trainer.dataset.root=/data"]) == 0
    lines = capsys.readouterr().out.splitlines()
    numbered = [line.partition(". ")[2] for line in lines if line[0].isdigit()]
    assert [title.split(":")[0] for title in numbered] == [
        "start the broker",
        "start 2 generators with the backend ti2v",
        "read the data",
        "find neutral frames to begin with",
        "learn a policy that chooses steps and guidance",
        "before training, make clips, with prompts from action units",
        "train for video, mode offline",
        "measure",
        "keep it all in runs/dfew",
    ]
    assert list(tmp_path.iterdir()) == []
    assert [arguments[0] for arguments in asked] == ["--check"] and "trainer.dataset.root=/data" in asked[0]
    assert cli.main([*arguments, "agent.policy.steps=0"]) == 2
    assert "agent.policy.steps" in capsys.readouterr().err


def test_of_clips_the_plan_says_who_reads_faces_who_writes_prompts_and_what_the_policy_learns():
    found = planned("dfew", "generator.faces.openface.binary=/opt/FeatureExtraction", "trainer.dataset.fold=3")
    _, generator = step(found, "start 1 generator")
    assert "generator.ti2v.checkpoint = ali-vilab/text-to-video-ms-1.7b" in generator
    _, data = step(found, "read the data")
    assert "trainer.dataset.fold = 3" in data and "# /data is not there yet" in data
    title, faces = step(found, "find neutral frames")
    assert "openface" in title and "generator.faces.openface.binary = /opt/FeatureExtraction" in faces
    assert faces[-1][0] != "#" and step(planned("dfew"), "find neutral frames")[1][-1].startswith("# where is OpenFace")
    stored = planned("dfew", "generator.faces.openface.folder=csv")
    assert "a policy has it read what is made" in step(stored, "find neutral frames")[1][-1]
    title, prompts = step(found, "before training, make clips")
    assert title.endswith(": local")
    assert "agent.expressions.local.model = Qwen/Qwen2.5-VL-7B-Instruct" in prompts
    assert "agent.expressions.retrieval = true" in prompts
    title, policy = step(found, "learn a policy")
    assert "2,000 updates of 32 pairs" in title and "4 clips a pair" in title and "so 12 a pair at most" in title
    assert title.endswith("483 pairs in all, 5,796 clips")
    assert "agent.policy.rewards.quality.weight = 3.0" in policy and "agent.policy.learning_rate = 0.0001" in policy
    _, training = step(found, "train for video")
    assert "trainer.feedback.scarcity.classes = ['surprise', 'disgust', 'fear']" in training
    live, measured = planned("dfew", "trainer.mode=async"), "trainer.measure.video.features=torchscript:i3d.pt"
    assert step(live, "while training, make clips") and step(found, "measure")[1][-1].startswith("# no Frechet")
    assert not any(line.startswith("#") for line in step(planned("dfew", measured), "measure")[1])
    factorised = planned("dfew", "agent.policy.actions.factorised=true", "agent.policy.cache=false")
    assert "at most" not in step(factorised, "learn a policy")[0]
    factorised = planned("dfew", "agent.policy.actions.factorised=true")
    assert "so 16 a pair at most" in step(factorised, "learn a policy")[0]  # 4 T x 2 a x 2 b
    drawn = planned("dfew", "agent.policy.method=random")
    assert [title for title in drawn if "policy" in title] == ["make a policy that draws steps and guidance"]
    assert not [title for title in planned("ckplus") if "policy" in title]


@pytest.mark.parametrize("recipe", recipes.names())
def test_every_recipe_has_a_plan_with_all_that_it_says(recipe: str):
    settings = config.load(recipes.find(recipe), ['trainer.dataset.root="/data"'])
    told = {line for _, lines in plan(settings) for line in lines}
    for table in ("generator", "trainer"):
        assert set(said(table, settings[table])) <= told
    for name in ("adapt", "tune"):
        title = "adapt the generator" if name == "adapt" else "tune by reward the generator"
        assert (name in settings["agent"]) == any(t.startswith(title) for t, _ in plan(settings))
    settings["agent"] = {key: value for key, value in settings["agent"].items() if key != "adapt"}
    assert not any(title.startswith("adapt") for title, _ in plan(settings))


def test_secrets_are_not_shown():
    shown = said("agent", {"openai": {"api_key": "hidden", "url": "https://user:hidden@host/v1", "timeout_s": 3}})
    assert shown == [
        "agent.openai.api_key = ***",
        "agent.openai.url = https://***@host/v1",
        "agent.openai.timeout_s = 3",
    ]
