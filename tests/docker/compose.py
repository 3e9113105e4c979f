"""compose.yaml as plain processes: each service's own command, environment and health check, without containers.

What a container changes is put into the texts instead: a path inside it becomes the folder that is mounted there, a
service's host name becomes 127.0.0.1, and its port one that is free. Images, users and capabilities are not acted on.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

DOCKER = Path(__file__).parents[2] / "docker"
HEALTH_S = 60.0  # for a service to become healthy
VARIABLE = re.compile(r"\$(?:\$|\{(?P<name>\w+)(?::(?P<kind>[-?])(?P<rest>[^{}]*))?\})")


class Unset(Exception):
    """A variable that the file requires has no value; the message is the file's own."""


def read_env(path: Path) -> dict[str, str]:
    """An .env file: NAME=value lines and comments."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def interpolate(value: Any, variables: Mapping[str, str]) -> Any:
    """Put variables in, as `docker compose` does: ${A}, ${A:-default}, ${A:?message} and $$. Raises Unset."""
    if isinstance(value, dict):
        return {key: interpolate(inner, variables) for key, inner in value.items()}
    if isinstance(value, list):
        return [interpolate(inner, variables) for inner in value]
    if not isinstance(value, str):
        return value

    def replace(found: re.Match[str]) -> str:
        if found[0] == "$$":
            return "$"
        text = variables.get(found["name"], "")
        if text or found["kind"] is None:
            return text
        if found["kind"] == "?":
            raise Unset(found["rest"])
        return found["rest"]

    return VARIABLE.sub(replace, value)


def load(*paths: Path, variables: Mapping[str, str]) -> dict[str, Any]:
    """The files laid over each other (mappings merge, all else is replaced), with variables put in."""
    merged: dict[str, Any] = {}
    for path in paths:
        merged = _merge(merged, interpolate(yaml.safe_load(path.read_text()), variables))
    return merged


def _merge(below: Any, above: Any) -> Any:
    if isinstance(below, dict) and isinstance(above, dict):
        return below | {key: _merge(below.get(key), value) for key, value in above.items()}
    return above


def mounts(service: Mapping[str, Any]) -> dict[str, Path | str | None]:
    """Path in the container -> what is mounted there: a path on the host, the name of a volume, or None (anonymous)."""
    found: dict[str, Path | str | None] = {}
    for volume in service.get("volumes", ()):
        if isinstance(volume, dict):
            found[volume["target"]] = DOCKER / volume["source"]
        elif ":" in volume:
            name, target = volume.split(":")
            found[target] = name
        else:
            found[volume] = None
    return found


class Machine:
    """Runs the services of a compose file as processes. A context: at its end every one of them is stopped.

    Args:
        folder: for volumes, logs, and the mounted files with their texts changed.
        ports: port in the containers -> port on this machine.
    """

    def __init__(self, compose: Mapping[str, Any], folder: Path, ports: Mapping[int, int]):
        self.services = compose["services"]
        self._folder, self._ports = folder, ports
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._processes.values()):
            process.terminate()
        for process in self._processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def up(self) -> None:
        """Start every service when what it depends on is as its condition says."""
        waiting = dict(self.services)
        while waiting:
            ready = [name for name, service in waiting.items() if not set(service.get("depends_on", ())) & set(waiting)]
            assert ready, f"these depend on each other: {sorted(waiting)}"
            for name in ready:
                for other, how in waiting.pop(name).get("depends_on", {}).items():
                    self._await(other, how["condition"])
                self._processes[name] = self._start(name)

    def wait(self, name: str, timeout: float) -> int:
        """Exit status of a service that ends by itself."""
        return self._processes[name].wait(timeout)

    def log(self, name: str) -> str:
        return (self._folder / f"{name}.log").read_text()

    def place(self, name: str, target: str) -> Path:
        """What is mounted at `target` in a service."""
        source = mounts(self.services[name])[target]
        if isinstance(source, Path) and source.is_dir():
            return source
        if isinstance(source, Path):
            copy = self._folder / name / target.lstrip("/")
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(self._outside(name, source.read_text(), without=target))
            return copy
        place = self._folder / "volumes" / (source or f"{name}{target}")
        place.mkdir(parents=True, exist_ok=True)
        return place

    def _await(self, name: str, condition: str) -> None:
        if condition == "service_completed_successfully":
            assert self.wait(name, HEALTH_S) == 0, self.log(name)
            return
        assert condition == "service_healthy"
        check = self.services[name]["healthcheck"]["test"]
        command = ["sh", "-c", *check[1:]] if check[0] == "CMD-SHELL" else check[1:]
        deadline = time.monotonic() + HEALTH_S
        while subprocess.run(self._command(name, command), env=self._environment(name), capture_output=True).returncode:
            assert self._processes[name].poll() is None, self.log(name)
            assert time.monotonic() < deadline, self.log(name)
            time.sleep(0.2)

    def _start(self, name: str) -> subprocess.Popen[bytes]:
        command = self._command(name, [*entrypoint(self.services[name]), *self.services[name]["command"]])
        with (self._folder / f"{name}.log").open("w") as log:
            return subprocess.Popen(command, env=self._environment(name), cwd=self._folder, stdout=log, stderr=log)

    def _command(self, name: str, words: Sequence[str]) -> list[str]:
        programs = {"onthefly": [sys.executable, "-m", "agent.cli"], "python": [sys.executable]}
        return [*programs.get(words[0], [words[0]]), *(self._outside(name, word) for word in words[1:])]

    def _environment(self, name: str) -> dict[str, str]:
        own = self.services[name].get("environment", {})
        inherited = {"PATH": os.environ["PATH"], "PYTHONPATH": str(DOCKER.parent), "OMP_NUM_THREADS": "1"}
        return inherited | {key: self._outside(name, value) for key, value in own.items()}

    def _outside(self, name: str, text: str, without: str = "") -> str:
        """A text of a service as it reads outside its container."""
        for port, here in self._ports.items():
            text = re.sub(rf"\b{port}\b", str(here), text)
        for other in self.services:
            text = re.sub(rf"(?<=[/@]){other}(?=:\d)", "127.0.0.1", text)
        targets = sorted(set(mounts(self.services[name])) - {without}, key=len, reverse=True)
        inside = rf"(?<![\w./-])({'|'.join(map(re.escape, targets))})(?![\w-])"
        return re.sub(inside, lambda found: str(self.place(name, found[1])), text) if targets else text


def entrypoint(service: Mapping[str, Any]) -> list[str]:
    """Of the image: what its Dockerfile says; nothing for an image of somebody else's."""
    names = {"onthefly-generator": "generator.Dockerfile", "onthefly-trainer": "trainer.Dockerfile"}
    dockerfile = names.get(service["image"].split(":")[0])
    if dockerfile is None:
        return []
    line = re.search(r"^ENTRYPOINT (\[.*\])$", (DOCKER / dockerfile).read_text(), re.MULTILINE)
    assert line is not None
    return yaml.safe_load(line[1])
