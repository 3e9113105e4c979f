"""Which runs of an ablation are made, made again or gone on with, and what is refused before; without any service."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest

from agent import ablate, cli, machine, recipes
from agent.ablation import grid, runs
from agent.ablation.runs import Bench
from agent.ablation.table import Changes
from agent.settings import AgentConfig
from protocol import config
from protocol.errors import ConfigError, ServiceUnreachable

PETS, DIGITS = recipes.find("pets"), recipes.find("digits")
SOMEWHERE = ['trainer.dataset.root="/data"']


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench.of(PETS, SOMEWHERE, tmp_path / "seed-0", 0)


@pytest.mark.parametrize(
    "taken",
    ["trainer.seed=3", "trainer.runs_dir=/a", " trainer.run =x", "generator.weights_dir=w", "generator.samples_dir=s"],
)
def test_what_an_ablation_sets_is_not_the_user_s_to_set(tmp_path: Path, taken: str, capsys: pytest.CaptureFixture[str]):
    arguments = ["--recipe", "pets", "--set", *SOMEWHERE, "--set", taken, "--out", str(tmp_path)]
    assert cli.main(["ablate", *arguments]) == 2
    assert f"an ablation sets {taken.partition('=')[0].strip()} itself" in capsys.readouterr().err


def test_nothing_to_compare_is_told_before_anything_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "machine", lambda *_: pytest.fail("started"))
    with pytest.raises(ConfigError, match=r"set trainer\.test_split"):
        ablate.ablate(PETS, [*SOMEWHERE, "trainer.test_split="], grid.chosen(["4"], config.load(PETS)), [0], tmp_path)


@pytest.mark.parametrize(
    ("recipe", "said", "needs"),
    [
        ("market1501", "trainer.model={}", "query_split and gallery_split"),
        ("casia", "trainer.model.pairs=[]", r"trainer\.model\.pairs"),
        ("casia", "agent.tune_while_training=true", "agent.tune_while_training = false"),
        ("casia", "agent.tune.activate=false", r"activate = true in \[agent.adapt\]"),
        ("casia", "agent.adapt.activate=false", r"activate = true in \[agent.adapt\]"),
    ],
)
def test_identities_are_measured_on_something_and_weights_stay(
    recipe: str, said: str, needs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(machine, "machine", lambda *_: pytest.fail("started"))
    path, settings = recipes.find(recipe), [*SOMEWHERE, said]
    with pytest.raises(ConfigError, match=needs):
        ablate.ablate(path, settings, grid.chosen(["figure-5"], config.load(path, settings)), [0], tmp_path)


def finish(bench: Bench, run: str, changes: Changes, iterations: int = 20) -> None:
    (bench.folder / run).mkdir(parents=True)
    bench.note_begun(run, changes)
    (bench.folder / run / "summary.json").write_text(json.dumps({"iterations": iterations, "iterations_planned": 20}))


def test_a_run_is_done_when_its_summary_says_so_and_its_settings_are_the_same(bench: Bench):
    changes = {"trainer.mode": "real"}
    assert not bench.done("a", changes)
    finish(bench, "a", changes)
    finish(bench, "b", changes, iterations=19)
    assert bench.done("a", changes)
    assert not bench.done("b", changes)  # interrupted
    assert not bench.done("a", {"trainer.mode": "sync"})
    moved = Bench.of(PETS, ['trainer.dataset.root="/elsewhere"'], bench.folder, 0)
    assert not moved.done("a", changes)
    assert Bench.of(PETS, SOMEWHERE, bench.folder, 0).done("a", changes)


def test_what_is_done_needs_no_service(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    finish(bench, "a", {})
    monkeypatch.setattr(machine, "machine", lambda *_: pytest.fail("started"))
    assert runs.train(bench, {"a": {}}) == {}


def test_a_service_that_does_not_start_fails_its_own_arms_only(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    started = []

    def machine_of(path: Path, overrides: list[str]):
        started.append([text for text in overrides if text.startswith("agent.")])
        raise ServiceUnreachable(f"no. {len(started)}")

    monkeypatch.setattr(machine, "machine", machine_of)
    arms = {"a": {}, "b": {"agent.strength": 0.5, "trainer.epochs": 1}, "c": {"trainer.epochs": 2}}
    assert runs.train(bench, arms) == {"a": "no. 1", "c": "no. 1", "b": "no. 2"}
    assert started == [[], ["agent.strength=0.5"]]


class Trained:
    """A machine on which trainings end at once; it notes which of them set an earlier run aside."""

    def __init__(self) -> None:
        self.fresh: dict[str, bool] = {}

    def prepare(self, agent: AgentConfig) -> None:
        pass

    def train(self, *arguments: str, fresh: bool, log: Path | None) -> Trained:
        self.fresh[arguments[1].removeprefix("trainer.run=")] = fresh
        return self

    def wait(self) -> int:
        return 0


def test_interrupted_runs_go_on_and_those_of_other_settings_are_made_anew(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
):
    trained = Trained()
    monkeypatch.setattr(machine, "machine", lambda *_: nullcontext(trained))
    finish(bench, "done", {})
    finish(bench, "interrupted", {}, iterations=19)
    finish(bench, "other", {"trainer.epochs": 1})
    assert runs.train(bench, {run: {} for run in ("done", "interrupted", "other", "new")}) == {}
    assert trained.fresh == {"interrupted": False, "other": True, "new": False}
    assert bench.begun("other", {}) and bench.begun("new", {})


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("{}\nerror: no such file\n{}\n", "no such file"),
        ("error: old\nerror: a.toml:\n  x: unknown\n  y: unknown\n", "a.toml: x: unknown y: unknown"),
        ("Traceback\nKeyError: 3\n", "KeyError: 3"),
        ("{}\n", "it did not say why"),
    ],
)
def test_the_reason_is_the_last_error_of_the_log(tmp_path: Path, log: str, words: str):
    (tmp_path / "log").write_text(log)
    assert runs._last_words(tmp_path / "log") == words


def test_drawn_images_and_what_is_adapted_to_them_are_the_seed_s_own(tmp_path: Path):
    pytest.importorskip("sklearn")
    first, second = (Bench.of(DIGITS, [], tmp_path / f"seed-{seed}", seed) for seed in (0, 1))
    root = next(text for text in first.own if text.startswith("trainer.dataset.root")).partition("=")[2].strip('"')
    assert len(list(Path(root).glob("train/*/*.png"))) == 50
    for place in ("generator.weights_dir", "trainer.dataset.root", "generator.samples_dir"):
        own = [next(text for text in one.own if text.startswith(place)) for one in (first, second)]
        assert own[0] != own[1]
    shared = [Bench.of(PETS, SOMEWHERE, tmp_path / f"seed-{seed}", seed).own[1] for seed in (0, 1)]
    assert shared[0] == shared[1]  # the same images: adapted once
