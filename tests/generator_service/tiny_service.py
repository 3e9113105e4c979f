"""A service small enough for tests, on disk and over HTTP, through the real code paths."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from PIL import Image

from agent.settings import AgentConfig
from generator_service.app import create_app
from generator_service.service import Service
from generator_service.settings import GeneratorConfig
from protocol.bus import QueueConfig
from tests.generator_service.tiny_dit import CLASSES

SIZE = 8


def write_dataset(root: Path, per_class: int = 4) -> Path:
    """Class folders of the checkpoint's classes, with noise pictures."""
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (root / name).mkdir(parents=True)
        for index in range(per_class):
            grey = rng.integers(0, 256, (SIZE, SIZE), dtype=np.uint8)
            Image.fromarray(grey).save(root / name / f"{index}.png")
    return root


def make_service(folder: Path, broker_url: str = "embedded", **settings: Any) -> Service:
    """A service whose state lies in `folder`; not started. The broker "embedded" means none."""
    defaults = {
        "weights_dir": folder / "weights",
        "samples_dir": folder / "samples",
        "images": {"steps": 4, "guidance_scale": 2.0},
        "batch_window_ms": 0.0,
    }
    agent = AgentConfig(steps=4, images_per_sample=2, unit_size=4, strength=0.5, guidance_scale=2.0)
    queue = QueueConfig(url=broker_url, lease_idle_s=1.0)
    return Service(GeneratorConfig.model_validate(defaults | settings), agent, queue)


@contextmanager
def started(service: Service) -> Iterator[Service]:
    """The service, ready; stopped at the end."""
    service.start()
    try:
        service.engine.ready.result()
        yield service
    finally:
        service.stop()


@contextmanager
def served(service: Service, port: int = 0) -> Iterator[str]:
    """The URL of a real HTTP server for the service, which need not be started. Port 0: any free one."""
    with socket.create_server(("127.0.0.1", port)) as listener:
        server = uvicorn.Server(uvicorn.Config(create_app(service), log_config=None, timeout_graceful_shutdown=5))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
