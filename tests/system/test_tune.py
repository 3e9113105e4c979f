"""Tuning by reward with real processes: killed and taken up again, and as a user types it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tomli_w
import torch
from safetensors.torch import load_file

from protocol.client import GeneratorClient
from protocol.messages import WeightsInfo
from protocol.tuning import TuneJob
from tests.ports import free_port
from tests.system.whole import serving

ROOT = Path(__file__).parents[2]
JOB = {
    "name": "better",
    "base": "base",
    "steps": 8,
    "rollout": {"identities": 3, "samples": 2, "denoising_steps": 4, "batch_size": 4},
    "update": {"batch_size": 4, "learning_rate": 0.02, "epochs": 2, "baseline": "value"},
    "guard": {"kl_ceiling": 1e6},
    "features": "timm:test_resnet",
    "features_size": 32,
    "pretrained": False,
    "checkpoint_every": 3,
    "publish_every": 2,
}


def settings(folder: Path, checkpoint: Path, data: Path, port: int, **agent) -> Path:
    tables = {
        "generator": {
            "port": port,
            "threads": 1,
            "dataset": {"root": str(data)},
            "weights_dir": str(folder / "weights"),
            "samples_dir": str(folder / "samples"),
            "dit": {"checkpoint": str(checkpoint), "device": "cpu"},
        },
    } | ({"agent": agent} if agent else {})
    folder.mkdir(exist_ok=True)
    path = folder / "run.toml"
    path.write_text(tomli_w.dumps(tables))
    return path


@contextmanager
def service(folder: Path, checkpoint: Path, data: Path) -> Iterator[tuple[subprocess.Popen, GeneratorClient]]:
    """A process of its own, ready; killed at the end."""
    port = free_port()
    path = settings(folder, checkpoint, data, port)
    command = [sys.executable, "-m", "generator_service", "--config", str(path)]
    with (
        (folder / "log").open("a") as log,
        subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log) as process,
        GeneratorClient(f"http://127.0.0.1:{port}") as client,
    ):
        try:
            client.wait_ready(60.0)
            yield process, client
        finally:
            process.kill()


def tensors(folder: Path, made: WeightsInfo) -> dict[str, torch.Tensor]:
    return load_file(folder / "weights" / made.name / str(made.version) / "transformer_lora.safetensors")


def sets(client: GeneratorClient, name: str = JOB["name"]) -> list[WeightsInfo]:
    return [made for made in client.weights().data if made.name == name]


@pytest.mark.slow
def test_killed_and_taken_up_again_it_ends_with_the_same_bits(tmp_path: Path, checkpoint: Path, data: Path):
    """SIGKILL after the seventh rollout, of which the checkpoint holds six; sets of steps 2, 4 and 6 were published."""
    job = TuneJob.model_validate(JOB)
    with service(tmp_path, checkpoint, data) as (process, client):
        list(client.events(client.submit(job.model_copy(update={"name": "straight"})).id))
        straight = sets(client, "straight")
        for event in client.events(client.submit(job).id):
            if event.data.get("weights") == "better@3":
                process.kill()
                break
        process.wait()
    with service(tmp_path, checkpoint, data) as (_, client):
        begun = client.submit(job).id
        first = next(event for event in client.events(begun) if "loss" in event.data)
        list(client.events(begun))
        assert client.job(begun).status == "succeeded"
        resumed = sets(client)
    assert first.data["step"] == 7  # not from the beginning
    steps = [made.metadata["step"] for made in straight]
    assert steps == [2, 4, 6, 8] and [made.metadata["step"] for made in resumed] == steps
    for one, other in zip(straight, resumed, strict=True):
        ends, others = tensors(tmp_path, one), tensors(tmp_path, other)
        assert ends.keys() == others.keys()
        assert all(value.numpy().tobytes() == others[name].numpy().tobytes() for name, value in ends.items())
    assert any((value != 0).any() for name, value in tensors(tmp_path, resumed[-1]).items() if "lora_B" in name)


# ---------------------------------------------------------------- as a user types it


@pytest.fixture
def url(tmp_path: Path, broker: str, checkpoint: Path, data: Path) -> Iterator[str]:
    with serving(tmp_path, broker, checkpoint, data) as url:
        yield url


SMALL = [
    *("rollout.identities=2", "rollout.samples=2", "rollout.denoising_steps=3", "guard.kl_ceiling=5.0"),
    *("pretrained=false", "features_size=32"),
]


def tune(url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "agent.cli", "tune", *arguments, "--url", url]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def overrides(*values: str) -> list[str]:
    return [part for value in values for part in ("--set", value)]


def test_onthefly_tune_by_arguments(url: str):
    named = ("better", "--base", "base", "--steps", "2", "--features", "timm:test_resnet", "--activate")
    done = tune(url, *named, *overrides(*SMALL))
    assert done.returncode == 0 and "tuned: weights better@1" in done.stderr, done.stderr
    with GeneratorClient(url) as client:
        active = client.weights().active
        options = next(one for one in client.weights().data if one.name == "better").metadata["options"]
    assert (active.name, active.version) == ("better", 1)
    assert options["rollout"]["identities"] == 2 and options["steps"] == 2 and not options["pretrained"]
    assert "better@1" in tune(url, *named, *overrides(*SMALL)).stderr  # done before
    assert "better@2" in tune(url, *named, *overrides(*SMALL), "--again").stderr


def test_onthefly_tune_by_a_settings_file(url: str, tmp_path: Path, checkpoint: Path, data: Path):
    path = settings(tmp_path / "file", checkpoint, data, 0, tune=JOB | {"steps": 3, "publish_every": 2})
    done = tune(url, "--config", str(path), "--set", "agent.tune.name=other")
    assert done.returncode == 0 and "tuned: weights other@2" in done.stderr, done.stderr
    assert "step 2: weights other@1" in done.stderr
    bare = settings(tmp_path / "bare", checkpoint, data, 0)
    done = tune(url, "--config", str(bare))
    assert done.returncode == 0 and "no table [agent.tune]" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "say the NAME"),
        (["x", "--set", "rollout.identitis=3"], "rollout.identitis"),
        (["x", "--set", "steps=0"], "steps: "),
        (["x", "--config", "FILE"], "--set agent.tune.name="),
        (
            ["x", "--set", "rewards.semantic.weight=0", *overrides("rewards.coverage.weight=0")],
            "every reward has weight 0",
        ),
    ],
)
def test_what_is_typed_wrong_is_told(arguments: list[str], told: str, tmp_path: Path):
    (file := tmp_path / "run.toml").write_text("")
    arguments = [str(file) if argument == "FILE" else argument for argument in arguments]
    done = tune("http://127.0.0.1:9", *arguments)
    assert done.returncode == 2 and told in done.stderr
