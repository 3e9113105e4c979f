"""What the soak plays in: a small dataset, a tiny DiT, settings, and the processes that use them.

Everything lies in one folder, and the broker there writes every command to its append-only file before it answers.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tomli_w

from protocol.broker import URL_VARIABLE, server_binary
from tests.generator_service.tiny_dit import save_checkpoint
from tests.generator_service.tiny_service import write_dataset
from tests.ports import free_ports
from tests.soak.fleet import Fleet, module, program

RUN = "soak"
REPLICAS = ("generator-0", "generator-1")
LEASE_S = 2.0


@dataclass(frozen=True)
class Scene:
    """Where everything is."""

    folder: Path
    broker: str
    replicas: dict[str, str]  # name -> URL

    @property
    def run_folder(self) -> Path:
        return self.folder / "runs" / RUN


def build(folder: Path, iterations: int, patience_s: float) -> Scene:
    """Write dataset, checkpoint and settings. `patience_s`: how long an iteration waits for answers."""
    folder.mkdir(parents=True, exist_ok=True)
    data, checkpoint = write_dataset(folder / "data", per_class=8), save_checkpoint(folder / "checkpoint")
    ports = free_ports(3)
    urls = {name: f"http://127.0.0.1:{port}" for name, port in zip(REPLICAS, ports[1:], strict=True)}
    scene = Scene(folder, f"redis://127.0.0.1:{ports[0]}/0", urls)
    settings = {
        "broker": {"lease_idle_s": LEASE_S, "work_gate": 10, "batch_gate": 4, "max_deliveries": 2},
        "generator": {
            "dataset": {"root": str(data)},
            "dit": {"checkpoint": str(checkpoint), "device": "cpu"},
            "weights_dir": str(folder / "weights"),
            "threads": 1,
            "queue_threads": 2,
            "near_copy_distance": 0.44,
        },
        "agent": {"images_per_sample": 4, "unit_size": 4, "steps": 20, "strength": 0.5, "guidance_scale": 2.0},
        "trainer": _trainer(folder, data, urls[REPLICAS[0]], iterations, patience_s),
    }
    (folder / "soak.toml").write_text(tomli_w.dumps(settings))
    return scene


def _trainer(folder: Path, data: Path, url: str, iterations: int, patience_s: float) -> dict:
    return {
        "run": RUN,
        "runs_dir": str(folder / "runs"),
        "device": "cpu",
        "threads": 1,
        "dataset": {"root": str(data)},
        "test_split": "",
        "model": {"image_size": 8},
        "mode": "async",
        "max_staleness": 1,
        "iterations": iterations,
        "warmup_iterations": 2,
        "steps_per_iteration": 24,
        "batch_size": 8,
        "checkpoint_every": 10,
        "gradient_rows": 2,
        "drop_near_copies": True,
        "feedback": {"fraction": 0.25},
        "service": {"url": url, "on_outage": "wait", "answer_timeout_s": patience_s, "timeout_s": 5.0},
    }


def crew(scene: Scene, fleet: Fleet, trainer_flags: Sequence[str] = ()) -> None:
    """Add broker, replicas and trainer to the fleet, in the order in which they start."""
    os.environ |= {URL_VARIABLE: scene.broker, "OMP_NUM_THREADS": "1"}
    broker = scene.folder / "broker"
    broker.mkdir()
    port = scene.broker.rsplit(":", 1)[1].removesuffix("/0")
    options = {"port": port, "bind": "127.0.0.1", "dir": str(broker), "save": "", "maxmemory-policy": "noeviction"}
    options |= {"appendonly": "yes", "appendfsync": "no"}  # written before the answer; only not flushed to the disk
    command = [server_binary(), *(part for name, value in options.items() for part in (f"--{name}", value))]
    fleet.add("broker", program(command), scene.folder)
    common = ["--config", str(scene.folder / "soak.toml")]
    for name, url in scene.replicas.items():
        own = {"port": url.rsplit(":", 1)[1], "samples_dir": f'"{scene.folder / name}"'}
        arguments = [*common, *(part for key, value in own.items() for part in ("--set", f"generator.{key}={value}"))]
        fleet.add(name, module("generator_service", arguments, fleet.hits), scene.folder)
    fleet.add("trainer", module("trainer", common, fleet.hits, trainer_flags), scene.folder)
