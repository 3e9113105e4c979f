"""The launcher as a process: early liveness, exit codes, signals, and the end of its parent."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from generator_service.settings import GeneratorConfig
from protocol.client import GeneratorClient
from protocol.config import load, section
from protocol.errors import ConfigError
from protocol.messages import ImageGenerationRequest


def launch(tmp_path: Path, *arguments: str, **more) -> subprocess.Popen:
    overrides = [
        f"generator.weights_dir={tmp_path / 'weights'}",
        f"generator.samples_dir={tmp_path / 'samples'}",
        "generator.port=0",
        *arguments,
    ]
    command = [sys.executable, "-m", "generator_service"]
    for override in overrides:
        command += [override] if override.startswith("--") else ["--set", override]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)


def address(process: subprocess.Popen) -> str:
    """From the log, which is JSON lines where there is no terminal."""
    for line in process.stderr:
        message = json.loads(line)["message"]
        if message.startswith("listening on "):
            return message.removeprefix("listening on ")
    raise AssertionError("it never listened")


@pytest.mark.parametrize("how", ["SIGTERM", "parent"])
def test_it_answers_early_serves_and_stops_cleanly(tmp_path: Path, checkpoint: Path, how: str):
    arguments = [f"generator.dit.checkpoint={checkpoint}", "--exit-with-parent"]
    with launch(tmp_path, *arguments) as process:
        url = address(process)
        assert httpx.get(f"{url}/livez").status_code == 200
        with GeneratorClient(url) as client:
            client.wait_ready(60.0)
            request = ImageGenerationRequest(prompt="alpha", num_inference_steps=2)
            assert len(client.generate(request).data) == 1
        if how == "parent":
            process.stdin.close()
        else:
            process.send_signal(signal.SIGTERM)
        assert process.wait() == 0
        process.stdin.close()
    assert (tmp_path / "samples" / "settings.toml").exists()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("generator.max_bach=3", "did you mean 'max_batch'"),
        ("generater.port=3", "unknown table"),
        ("generator.max_batch=0", "generator.max_batch"),
        ("generator.dataset.root=/nope", "/nope"),
        ("generator.backend=paint", "'paint'"),
        ("generator.host=192.0.2.1", "generator.host"),
    ],
)
def test_wrong_settings_end_it_with_status_two_and_say_why(tmp_path: Path, override: str, said: str):
    with launch(tmp_path, override) as process:
        _, errors = process.communicate()
        assert process.returncode == 2
    assert f"error: {errors.split('error: ')[-1]}" in errors and said in errors
    assert "Traceback" not in errors


def test_the_key_is_never_logged_nor_written(tmp_path: Path):
    with launch(tmp_path, "generator.api_key=hush", "generator.dataset.root=/nope") as process:
        _, errors = process.communicate()
    assert "hush" not in errors
    assert "hush" not in (tmp_path / "samples" / "settings.toml").read_text()


def test_a_backends_table_stands_under_its_name():
    settings = load(None, ["generator.dit.checkpoint=x", "generator.dit.device=cpu"])
    assert section(settings, "generator", GeneratorConfig).backends == {"dit": {"checkpoint": "x", "device": "cpu"}}
    with pytest.raises(ConfigError, match="dot"):
        section(load(None, ["generator.dot.checkpoint=x"]), "generator", GeneratorConfig)
