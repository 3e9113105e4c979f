"""Generator services and trainers as processes of their own, each kept to one core."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tomli_w

from protocol.client import GeneratorClient
from tests.ports import free_port


def cores() -> list[int]:
    """Those that this process may use."""
    return sorted(os.sched_getaffinity(0))


@contextmanager
def generator(folder: Path, broker_url: str, core: int, checkpoint: Path, **settings: Any) -> Iterator[GeneratorClient]:
    """A ready service on this core, computing on one thread; `settings` are tables laid over its own."""
    port = free_port()
    own = {"port": port, "threads": 1, "dit": {"checkpoint": str(checkpoint)}}
    own |= {"weights_dir": str(folder / "weights"), "samples_dir": str(folder / "samples")}
    tables = settings | {"generator": own | settings.get("generator", {})}
    url = f"http://127.0.0.1:{port}"
    with _started("generator_service", folder, broker_url, core, tables), GeneratorClient(url) as client:
        client.wait_ready(60.0)
        yield client


def train(folder: Path, broker_url: str, core: int, trainer: Mapping[str, Any]) -> None:
    """Run a trainer on this core until it is done. Raises CalledProcessError when it fails."""
    with _started("trainer", folder, broker_url, core, {"trainer": {"threads": 1, **trainer}}) as process:
        if status := process.wait():
            raise subprocess.CalledProcessError(status, process.args, (folder / "trainer.log").read_text())


@contextmanager
def _started(
    module: str, folder: Path, broker_url: str, core: int, tables: Mapping[str, Any]
) -> Iterator[subprocess.Popen[bytes]]:
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / f"{module}.toml"
    config.write_text(tomli_w.dumps(tables))
    command: Sequence[str] = ["-m", module, "--config", str(config), "--exit-with-parent"]
    with (folder / f"{module}.log").open("w") as log:
        process = subprocess.Popen(
            ["taskset", "--cpu-list", str(core), sys.executable, *command],
            env={**os.environ, "OMP_NUM_THREADS": "1", "ONTHEFLY_BROKER_URL": broker_url},
            stdin=subprocess.PIPE,
            stderr=log,
        )
        with process:
            try:
                yield process
            finally:
                process.terminate()
