"""Service, broker or trainer die in the middle of a run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from protocol.broker import URL_VARIABLE, EmbeddedBroker
from protocol.errors import ConfigError, DatasetError, TrainingDiverged
from tests.system.whole import run_training, serving, trainer_config
from trainer import checkpoint as checkpoints
from trainer import record
from trainer.run import Run


def events(run: Run) -> list[str]:
    return [row["event"] for row in record.rows(run.config.folder / "events.jsonl")]


def candidates(run: Run) -> list[int]:
    return [int(row["candidates"]) for row in record.rows(run.config.folder / "metrics.jsonl")]


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_training_finishes_without_the_service_and_says_so_once(
    tmp_path: Path, broker: str, checkpoint: Path, data: Path, mode: str
):
    with ExitStack() as stack:
        url = stack.enter_context(serving(tmp_path, broker, checkpoint, data))
        config = trainer_config(tmp_path / "runs", data, url, mode=mode, iterations=6)

        def stop_service(run: Run) -> None:
            if run.at.iteration == 3 and run.at.done == 1:
                stack.close()

        run = run_training(config, broker, stop_service)
    assert run.at.iteration == 6
    assert events(run).count("outage") == 1
    got = candidates(run)
    assert got[:2] == [0, 0]
    if mode == "sync":
        assert got[2] == got[3] == 10
    else:  # an answer that is there before it is due is trained on then: the sums are what is sure
        assert 10 <= got[2] <= 20 <= got[2] + got[3] <= 30
        assert sum(got) + run.pool.stale == sum(len(batch.samples) for batch in run.pool.batches())
    assert got[-1] == 0


def test_it_picks_up_again_when_the_service_is_back(tmp_path: Path, broker: str, checkpoint: Path, data: Path):
    with ExitStack() as stack:
        service = stack.enter_context(ExitStack())
        url = service.enter_context(serving(tmp_path, broker, checkpoint, data))
        port = int(url.rsplit(":", 1)[1])
        config = trainer_config(tmp_path / "runs", data, url, iterations=7)

        def stop_and_start(run: Run) -> None:
            if run.at.iteration == 2 and run.at.done == 1:
                service.close()
            if run.at.iteration == 4 and run.at.done == 1:
                stack.enter_context(serving(tmp_path, broker, checkpoint, data, at_port=port))

        run = run_training(config, broker, stop_and_start)
    assert events(run).count("outage") == 1
    assert events(run).count("recovery") == 1
    got = candidates(run)
    assert got[2] == 10
    assert got[3] == got[4] == 0
    assert got[5] == got[6] == 10


def test_on_outage_wait_waits(tmp_path: Path, broker: str, checkpoint: Path, data: Path):
    """The service is away when iteration 3 asks, and comes back while the trainer waits."""
    with ExitStack() as stack:
        service = stack.enter_context(ExitStack())
        url = service.enter_context(serving(tmp_path, broker, checkpoint, data))
        port = int(url.rsplit(":", 1)[1])
        settings = {"url": url, "on_outage": "wait", "outage_grace_s": 0.2}
        config = trainer_config(tmp_path / "runs", data, url, service=settings)
        restarter: list[subprocess.Popen] = []

        def swap(run: Run) -> None:
            if run.at.iteration == 2 and run.at.done == 1:
                service.close()
                restarter.append(serve_later(tmp_path, broker, checkpoint, data, port))

        run = run_training(config, broker, swap)
        for process in restarter:
            process.terminate()
            process.wait()
    assert candidates(run) == [0, 0, 10, 10, 10]
    assert events(run).count("outage") == 1
    assert events(run).count("recovery") == 1


def serve_later(folder: Path, broker: str, checkpoint: Path, data: Path, port: int) -> subprocess.Popen:
    """A service process; importing torch alone takes longer than the outage's grace time."""
    settings = {
        "generator.port": port,
        "generator.threads": 1,
        "generator.dit.checkpoint": f'"{checkpoint}"',
        "generator.dit.device": '"cpu"',
        "generator.dataset.root": f'"{data}"',
        "generator.weights_dir": f'"{folder / "weights"}"',
        "generator.samples_dir": f'"{folder / "samples"}"',
        "agent.images_per_sample": 2,
        "agent.steps": 4,
        "agent.unit_size": 4,
    }
    arguments = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    environment = {**os.environ, URL_VARIABLE: broker}
    return subprocess.Popen([sys.executable, "-m", "generator_service", *arguments], env=environment)


def test_training_finishes_without_the_broker(tmp_path: Path, checkpoint: Path, data: Path):
    """The service stays, and refuses feedback for want of the broker."""
    with ExitStack() as stack:
        broker = stack.enter_context(ExitStack())
        url_of_broker = broker.enter_context(EmbeddedBroker()).url
        url = stack.enter_context(serving(tmp_path, url_of_broker, checkpoint, data))

        def stop_broker(run: Run) -> None:
            if run.at.iteration == 2 and run.at.done == 1:
                broker.close()

        run = run_training(trainer_config(tmp_path / "runs", data, url), url_of_broker, stop_broker)
    assert run.at.iteration == 5
    assert candidates(run) == [0, 0, 10, 0, 0]
    messages = [row["message"] for row in record.rows(run.config.folder / "events.jsonl") if row["event"] == "outage"]
    assert len(messages) == 1
    assert "the broker is gone" in messages[0]


def test_a_killed_trainer_goes_on_from_its_checkpoint(tmp_path: Path, broker: str, checkpoint: Path, data: Path):
    """SIGKILL in the middle of stage 2; the same command again ends with the same weights as without the kill."""
    with serving(tmp_path, broker, checkpoint, data) as url:
        whole = run_training(trainer_config(tmp_path / "whole", data, url, iterations=8), broker)
        config = trainer_config(tmp_path / "killed", data, url, iterations=8, checkpoint_every=3)
        command, environment = trainer_command(tmp_path, config, broker)
        first = subprocess.Popen(command, env=environment)
        wait_for(lambda: len(record.rows(config.folder / "metrics.jsonl")) >= 3)
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert len(record.rows(config.folder / "metrics.jsonl")) < 8, "it was killed too late to show anything"
        second = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert "going on at iteration" in second.stderr
    state = checkpoints.load(config.folder / "checkpoints")
    assert state is not None
    assert all((state["model"][name] == value).all() for name, value in whole.model.state_dict().items())


def trainer_command(tmp_path: Path, config, broker: str) -> tuple[list[str], dict[str, str]]:
    import tomli_w

    path = tmp_path / "run.toml"
    path.write_text(tomli_w.dumps({"trainer": config.model_dump(mode="json", exclude_none=True)}))
    environment = {**os.environ, URL_VARIABLE: broker, "OMP_NUM_THREADS": "1"}
    return [sys.executable, "-m", "trainer", "--config", str(path)], environment


def wait_for(condition, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.01)


def test_a_loss_that_is_not_a_number_stops_the_run_and_nothing_bad_is_saved(tmp_path: Path, data: Path):
    """It diverges at the last update of an iteration, which no later loss shows; the run can go on from before."""

    def blow_up(run: Run) -> None:
        if run.at.iteration == 2 and run.at.done == run.steps():
            for parameter in run.model.parameters():
                parameter.data.fill_(float("nan"))

    config = trainer_config(tmp_path, data, "", mode="real", checkpoint_every=1)
    with pytest.raises(TrainingDiverged, match=r"learning_rate \(now 0\.05\)"):
        run_training(config, "embedded", blow_up)
    state = checkpoints.load(config.folder / "checkpoints")
    assert state is not None
    assert all(value.isfinite().all() for value in state["model"].values())
    assert run_training(config, "embedded").at.iteration == 5
    assert "NaN" not in (config.folder / "metrics.jsonl").read_text()


def test_a_rate_that_is_far_too_high(tmp_path: Path, data: Path):
    config = trainer_config(tmp_path, data, "", mode="real", optimizer={"learning_rate": 1e20}, iterations=30)
    with pytest.raises(TrainingDiverged, match="learning_rate"):
        run_training(config, "embedded")


def test_a_label_means_the_same_class_in_every_split(tmp_path: Path, data: Path):
    """The held-out split lacks a class: it must not number the others anew."""
    root = tmp_path / "data"
    for split, names in (("part1", ("alpha", "beta", "gamma")), ("part2", ("beta", "gamma"))):
        for name in names:
            shutil.copytree(data / name, root / split / name)
    config = trainer_config(
        tmp_path, data, "", mode="real", dataset={"root": root, "split": "part1"}, test_split="part2"
    )
    with pytest.raises(DatasetError, match=r"'alpha'.*trainer.test_split"):
        run_training(config, "embedded")


def test_a_missing_test_split_is_told(tmp_path: Path, data: Path):
    with pytest.raises(DatasetError, match=r'set it to "" when nothing is held out'):
        run_training(trainer_config(tmp_path, data, "", mode="real", test_split="test"), "embedded")


def test_a_device_that_is_not_there_is_told(tmp_path: Path, data: Path):
    for device in ("cuda:9", "abacus"):
        with pytest.raises(ConfigError, match=device):
            run_training(trainer_config(tmp_path, data, "", mode="real", device=device), "embedded")


def test_a_run_with_other_settings_is_not_resumed(tmp_path: Path, data: Path):
    run_training(trainer_config(tmp_path, data, "", mode="real"), "embedded")
    with pytest.raises(ConfigError, match=r"seed.*--fresh"):
        run_training(trainer_config(tmp_path, data, "", mode="real", seed=1), "embedded")


def test_a_trainer_alone_cannot_use_an_embedded_broker(tmp_path: Path, data: Path):
    with pytest.raises(ConfigError, match="onthefly up"):
        run_training(trainer_config(tmp_path, data, "http://127.0.0.1:9"), "embedded")
