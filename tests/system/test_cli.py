"""`onthefly ...` as a user types it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tomli_w
from PIL import Image

from agent import cli
from protocol.client import GeneratorClient
from tests.system.whole import serving, trainer_config
from trainer import record

ONTHEFLY = [sys.executable, "-m", "agent.cli"]


@pytest.fixture
def settings(tmp_path: Path, checkpoint: Path, data: Path) -> Path:
    """A run of a few seconds: cold start, then asynchronous training."""
    trainer = trainer_config(tmp_path / "runs", data, "", mode="async", max_staleness=1, iterations=4)
    tables = {
        "generator": {
            "port": 0,
            "threads": 1,
            "dataset": {"root": str(data)},
            "weights_dir": str(tmp_path / "weights"),
            "samples_dir": str(tmp_path / "samples"),
            "dit": {"checkpoint": str(checkpoint), "device": "cpu"},
        },
        "agent": {
            "images_per_sample": 2,
            "steps": 4,
            "unit_size": 4,
            "adapt": {"name": "mine", "steps": 5, "batch_size": 4, "activate": True},
        },
        "trainer": trainer.model_dump(mode="json", exclude_none=True),
    }
    path = tmp_path / "run.toml"
    path.write_text(tomli_w.dumps(tables))
    return path


@contextmanager
def onthefly(log: Path, *arguments: str) -> Iterator[subprocess.Popen]:
    """The command in a session of its own, as a terminal would start it; what it says goes to the log."""
    with (
        log.open("w") as file,
        subprocess.Popen([*ONTHEFLY, *arguments], stderr=file, start_new_session=True) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


def descendants(pid: int) -> set[int]:
    table = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parent_of = {int(child): int(parent) for child, parent in (line.split() for line in table.splitlines())}
    found, frontier = set(), {pid}
    while frontier:
        frontier = {child for child, parent in parent_of.items() if parent in frontier} - found
        found |= frontier
    return found


def alive(pids: set[int]) -> set[int]:
    table = subprocess.run(["ps", "-eo", "pid=,stat="], capture_output=True, text=True, check=True).stdout
    running = {int(line.split()[0]) for line in table.splitlines() if not line.split()[1].startswith("Z")}
    return pids & running


def wait_until(condition, timeout_s: float = 100.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.05)


def test_up_adapts_trains_and_leaves_nothing_behind(tmp_path: Path, settings: Path):
    settings.write_text(settings.read_text().replace("[generator]", '[generator]\napi_key = "s3cret"', 1))
    seen: set[int] = set()
    with onthefly(tmp_path / "log", "up", "--config", str(settings)) as process:
        while process.poll() is None:
            seen |= descendants(process.pid)
            time.sleep(0.2)
    log = (tmp_path / "log").read_text()
    assert process.returncode == 0, log
    assert len(seen) >= 4, "broker with its watcher, generator, trainer"
    assert alive(seen) == set()
    assert "s3cret" not in log
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path != settings]
    assert not [path for path in written if b"s3cret" in path.read_bytes()]
    run = record.Record.open(tmp_path / "runs" / "run")
    assert len(run.metrics) == 4
    assert {str(sample.weights) for sample in run.samples()} == {"mine@1"}
    assert "adapted: weights mine@1" in log


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_up_leaves_no_child_behind_when_it_is_stopped(tmp_path: Path, settings: Path, how: signal.Signals):
    metrics = tmp_path / "runs" / "run" / "metrics.jsonl"
    long = ("--set", "trainer.iterations=100000")
    with onthefly(tmp_path / "log", "up", "--config", str(settings), *long) as process:
        wait_until(lambda: metrics.exists() or process.poll() is not None)
        children = descendants(process.pid)
        assert len(children) >= 4, "broker with its watcher, generator, trainer"
        process.send_signal(how)
        wait_until(lambda: not alive(children))
        process.wait()
    assert process.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL)


def test_generate_writes_images(tmp_path: Path, broker: str, checkpoint: Path, data: Path, capsys):
    picture = next((data / "alpha").glob("*.png"))
    with serving(tmp_path, broker, checkpoint, data) as url:
        arguments = ["generate", "beta", "-n", "2", "--seed", "5", "--url", url, "--out", str(tmp_path / "out")]
        assert cli.main(arguments) == 0
        assert cli.main([*arguments, "--image", str(picture), "--strength", "0"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "seed 5" in printed[0]
    assert "seed 6" in printed[1]
    made, given = (Image.open(path).convert("RGB") for path in (printed[2].split("  ")[0], picture))
    assert made.tobytes() == given.tobytes()  # strength 0 returns the image


def test_adapt_makes_a_new_version_each_time(tmp_path: Path, broker: str, checkpoint: Path, data: Path, capsys):
    with serving(tmp_path, broker, checkpoint, data) as url, GeneratorClient(url) as client:
        for version in (1, 2):
            assert cli.main(["adapt", "mine", "--steps", "3", "--batch-size", "4", "--activate", "--url", url]) == 0
            assert str(client.weights().active) == f"mine@{version}"
    assert "mine@2" in capsys.readouterr().err


def test_adapt_does_what_the_settings_say_and_only_once(
    tmp_path: Path, broker: str, checkpoint: Path, data: Path, settings: Path, capsys
):
    with serving(tmp_path, broker, checkpoint, data) as url, GeneratorClient(url) as client:
        for _ in range(2):
            assert cli.main(["adapt", "--config", str(settings), "--url", url]) == 0
            assert str(client.weights().active) == "mine@1"
        settings.write_text("[agent]\nsteps = 3\n")
        assert cli.main(["adapt", "--config", str(settings), "--url", url]) == 0
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["train", "--set", "trainer.datset.root=/x"], 2, "datset"),
        (["train", "--set", "trainer.dataset.root=/nowhere"], 2, "/nowhere"),
        (["train", "--set", "training.x=1"], 2, "unknown table [training]"),
        (["serve", "--set", "generator.prot=1"], 2, "did you mean 'port'"),
        (["up", "--config", "/nowhere.toml"], 2, "cannot read the settings file"),
        (["generate", "x", "--url", "http://127.0.0.1:9"], 1, "onthefly serve"),
        (["generate", "x", "-n", "0"], 2, "greater than or equal to 1"),
        (["generate", "x", "--image", "/nowhere.png"], 2, "cannot read /nowhere.png"),
        (["generate", "x", "--url", "http://127.0.0.1:80a"], 2, "80a"),
        (["adapt", "../x"], 2, "name"),
        (["adapt"], 2, "NAME"),
        (["adapt", "x", "--set", "agent.adapt.steps=3"], 2, "--config"),
        (["adapt", "x", "--method", "dreambooth"], 2, "lora"),
        (["adapt", "x", "--lora", "rank=8"], 2, "set that method"),
        (["adapt", "x", "--method", "lora", "--lora", "rank"], 2, "table.key=value"),
        (["adapt", "x", "--method", "lora", "--lora", "rank=0"], 2, "greater than or equal to 1"),
        (["adapt", "--config", "/nowhere.toml"], 2, "cannot read the settings file"),
        (["adapt", "--config", "/nowhere.toml", "--steps", "3"], 2, "--set agent.adapt.steps="),
        (["demo", "--seed", "-1"], 2, "--seed"),
    ],
)
def test_mistakes_are_told(arguments: list[str], status: int, message: str):
    result = subprocess.run([*ONTHEFLY, *arguments], capture_output=True, text=True)
    assert result.returncode == status, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_mistake_in_any_table_is_told_before_anything_is_started(settings: Path):
    for override in ("trainer.iterations=0", "generator.prot=1", "agent.stepz=3", "broker.memory_mb=1"):
        command = [*ONTHEFLY, "up", "--config", str(settings), "--set", override]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode in (1, 2), result.stderr
        assert override.split("=")[0].split(".")[1] in result.stderr
        assert "Traceback" not in result.stderr


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_train_ends_well_when_it_is_stopped(tmp_path: Path, data: Path, how: signal.Signals):
    config = trainer_config(tmp_path / "runs", data, "", mode="real", iterations=100000)
    path = tmp_path / "train.toml"
    path.write_text(tomli_w.dumps({"trainer": config.model_dump(mode="json", exclude_none=True)}))
    metrics = config.folder / "metrics.jsonl"
    with onthefly(tmp_path / "log", "train", "--config", str(path)) as process:
        wait_until(lambda: metrics.exists() or process.poll() is not None)
        process.send_signal(how)
        assert process.wait(60) == 130
    log = (tmp_path / "log").read_text()
    assert "start the same command again" in log
    assert "Traceback" not in log


def test_a_user_without_a_trainer_table_is_told(tmp_path: Path):
    path = tmp_path / "run.toml"
    path.write_text("[agent]\nsteps = 3\n")
    result = subprocess.run([*ONTHEFLY, "up", "--config", str(path)], capture_output=True, text=True)
    assert (result.returncode, "trainer.dataset.root" in result.stderr) == (2, True)


def test_environment_is_not_needed(tmp_path: Path):
    """The entry point that pip installs."""
    program = Path(sys.executable).parent / "onthefly"
    if not program.exists():
        pytest.skip("onthefly is not installed in this environment: `make install`")
    result = subprocess.run([str(program), "--help"], capture_output=True, text=True, cwd=tmp_path, env={**os.environ})
    assert result.returncode == 0
    assert "demo" in result.stdout
