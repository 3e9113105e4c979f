"""The launcher as a process: early liveness, exit codes, signals, and the end of its parent."""

from __future__ import annotations

import json
import os
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
    ],
)
def test_wrong_settings_end_it_with_status_two_and_say_why(tmp_path: Path, override: str, said: str):
    with launch(tmp_path, override) as process:
        _, errors = process.communicate()
        assert process.returncode == 2
    assert f"error: {errors.split('error: ')[-1]}" in errors and said in errors
    assert "Traceback" not in errors


def test_the_key_is_never_logged_nor_written(tmp_path: Path):
    secrets = ("hush-user", "hush-boss", "hush-alice", "hush-broker", "hush-env")
    table = '[generator]\napi_key = "hush-user"\nadmin_key = "hush-boss"\nkeys = {alice = "hush-alice"}\n'
    (tmp_path / "run.toml").write_text(table + '[broker]\nurl = "redis://u:hush-broker@127.0.0.1:1/0"\n')
    environment = {**os.environ, "ONTHEFLY_API_KEY": "hush-env"}
    arguments = ("generator.dataset.root=/nope", f"--config={tmp_path / 'run.toml'}")
    with launch(tmp_path, *arguments, env=environment) as process:
        _, errors = process.communicate()
    assert process.returncode == 2 and "/nope" in errors
    written = (tmp_path / "samples" / "settings.toml").read_text()
    assert not [secret for secret in secrets if secret in errors or secret in written]
    assert 'keys = "***"' in written


@pytest.mark.parametrize(
    "override", ["generator.api_key=hush", "generator.keys.a=hush", "broker.url=redis://:hush@h:1"]
)
def test_secrets_do_not_belong_on_a_command_line(tmp_path: Path, override: str):
    with launch(tmp_path, override) as process:
        _, errors = process.communicate()
    assert process.returncode == 2 and "environment variable" in errors and "hush" not in errors


def test_other_machines_are_not_served_without_a_key(tmp_path: Path):
    with launch(tmp_path, "generator.host=0.0.0.0") as process:
        _, errors = process.communicate()
    assert process.returncode == 2 and "generator.insecure" in errors


def test_an_address_that_is_not_this_machines_is_told(tmp_path: Path):
    with launch(tmp_path, "generator.host=192.0.2.1", "generator.insecure=true") as process:
        _, errors = process.communicate()
    assert process.returncode == 2 and "cannot listen on 192.0.2.1" in errors


def test_two_replicas_do_not_keep_their_samples_in_one_folder(tmp_path: Path, checkpoint: Path):
    with launch(tmp_path, f"generator.dit.checkpoint={checkpoint}") as first:
        address(first)
        with launch(tmp_path, f"generator.dit.checkpoint={checkpoint}") as second:
            _, errors = second.communicate()
        assert second.returncode == 2 and "give each its own generator.samples_dir" in errors
        first.kill()
        first.communicate()
    with launch(tmp_path, f"generator.dit.checkpoint={checkpoint}") as after:
        address(after)
        after.kill()
        after.communicate()


def test_a_backends_table_stands_under_its_name():
    settings = load(None, ["generator.dit.checkpoint=x", "generator.dit.device=cpu"])
    assert section(settings, "generator", GeneratorConfig).backends == {"dit": {"checkpoint": "x", "device": "cpu"}}
    with pytest.raises(ConfigError, match="dot"):
        section(load(None, ["generator.dot.checkpoint=x"]), "generator", GeneratorConfig)


@pytest.mark.parametrize("outside", ["dataset.root", "weights_dir", "samples_dir"])
def test_folders_outside_the_roots_are_refused(tmp_path: Path, outside: str):
    roots = [f'generator.roots=["{tmp_path / "in"}", "{tmp_path / "data"}"]']
    paths = {"dataset.root": tmp_path / "data", "weights_dir": tmp_path / "in/w", "samples_dir": tmp_path / "in/s"}

    def settings(**changed: Path) -> GeneratorConfig:
        inside = [f"generator.{name}={path}" for name, path in (paths | changed).items()]
        return section(load(None, roots + inside), "generator", GeneratorConfig)

    settings()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to("/usr")
    for path in (Path("/usr"), tmp_path / "in" / ".." / "elsewhere", tmp_path / "in" / "link"):
        with pytest.raises(ConfigError, match=r"generator\.roots"):
            settings(**{outside: path})
