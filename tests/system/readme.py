"""The README's blocks, as its tests run them: its settings and commands, on a few samples."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

from tests.ports import free_port

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
PORT = free_port()  # for the service of the README's examples, which use 8000
SHORT = (  # the README's run, in seconds instead of hours
    "trainer.iterations=4 trainer.epochs=1 trainer.batch_size=8 trainer.device=cpu trainer.threads=1 agent.steps=4 "
    "trainer.gradient_rows=2 trainer.measure.severities=[3] "
    f"agent.adapt.steps=5 agent.adapt.batch_size=4 generator.threads=1 generator.dit.device=cpu generator.port={PORT} "
    f'trainer.service.url="http://127.0.0.1:{PORT}"'
).split()


def blocks(language: str) -> list[str]:
    return [text for kind, text in BLOCKS if kind == language]


def one(language: str, containing: str) -> str:
    found = [text for text in blocks(language) if containing in text]
    assert len(found) == 1, f"{len(found)} {language} blocks contain {containing!r}"
    return found[0]


def shell(script: str, folder: Path, environment: dict[str, str]) -> str:
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def overrides(settings: Iterable[str]) -> str:
    return " ".join(f"--set {setting!r}" for setting in settings)
