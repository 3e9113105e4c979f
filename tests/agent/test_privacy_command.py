from __future__ import annotations

from pathlib import Path

import pytest
import tomli_w

from agent import cli
from agent.privacy_command import AT_ONCE, find, questions
from agent.settings import AgentConfig
from protocol.errors import UnknownClass, UnknownWeights
from protocol.messages import WeightsInfo
from tests.trainer.run_folder import write_dataset

CLASSES = ("cat", "dog", "fox")


def weights(name: str = "mine", version: int = 1, classes: tuple[str, ...] = CLASSES) -> WeightsInfo:
    return WeightsInfo(
        name=name,
        version=version,
        digest="d",
        backend="dit",
        kind="full",
        base=None,
        classes=list(classes),
        created=0.0,
        active=False,
    )


def test_weights_are_found_by_name_and_version():
    known = [weights(version=2), weights(version=10), weights(version=9), weights("other", 30)]
    assert find(known, "mine").version == 10
    assert find(known, "mine@9").version == 9
    with pytest.raises(UnknownWeights, match="no weights 'mine@3'; it has mine@2, mine@10"):
        find(known, "mine@3")


def test_classes_get_as_many_samples_and_each_its_own_seed():
    asked = questions(weights(), CLASSES, 100, 7, AgentConfig())
    made = {name: sum(request.n for other, request in asked if other == name) for name in CLASSES}
    assert made == {"cat": 34, "dog": 33, "fox": 33}
    assert max(request.n for _, request in asked) == AT_ONCE
    seeds = [request.seed + index for _, request in asked for index in range(request.n)]
    assert seeds == list(range(7, 107))
    assert {(request.model, request.class_label == name) for name, request in asked} == {("mine@1", True)}


def test_weights_that_read_text_are_asked_by_prompt():
    agent = AgentConfig(prompt="a sketch of {class_name}", negative_prompt="blurry")
    ((name, request), *_) = questions(weights(classes=()), ("cat", "dog"), 2, 0, agent)
    assert (name, request.prompt, request.negative_prompt) == ("cat", "a sketch of cat", "blurry")
    assert request.class_label is None


def test_weights_of_other_classes():
    with pytest.raises(UnknownClass, match="mine@1 knows no class emu: name weights that were adapted"):
        questions(weights(), ("cat", "emu"), 10, 0, AgentConfig())


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "data")
    (tmp_path / "data" / "test").mkdir()
    path = tmp_path / "run.toml"
    path.write_text(tomli_w.dumps({"trainer": {"dataset": {"root": str(tmp_path / "data"), "split": "train"}}}))
    return path


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--samples", "1"], "--samples must be 2 at least"),
        (["--seed", "-1"], "--seed"),
        (["--held-out", "train"], "--held-out train is not held out from train"),
        (["--held-out", "none"], "has no split 'none'"),
        (["--set", "trainer.dataset.split=none"], "has no split 'none'"),
        (["--set", "generato.dataset.root=x"], "unknown table [generato]"),
    ],
)
def test_what_is_refused_before_anything_is_made(
    settings: Path, tmp_path: Path, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    assert cli.main(["privacy", "mine", "--config", str(settings), "--out", str(out), *arguments]) == 2
    assert told in capsys.readouterr().err
    assert not out.exists()


def test_no_dataset_and_a_folder_that_is_taken(tmp_path: Path, settings: Path, capsys: pytest.CaptureFixture[str]):
    empty = tmp_path / "empty.toml"
    empty.write_text("")
    assert cli.main(["privacy", "mine", "--config", str(empty)]) == 2
    assert "names no dataset" in capsys.readouterr().err
    (tmp_path / "out" / "samples").mkdir(parents=True)
    assert cli.main(["privacy", "mine", "--config", str(settings), "--out", str(tmp_path / "out")]) == 2
    assert "is there already" in capsys.readouterr().err
