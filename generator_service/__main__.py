"""`python -m generator_service --config FILE`: parse the settings first, only then import torch.

The socket is open before the model loads, so that /livez answers early and /readyz tells when it is ready. SIGTERM and
SIGINT finish the current batch, release leases and exit with status 0.
"""

from __future__ import annotations

import argparse
import logging
import math
import socket
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from types import FrameType

import uvicorn

from agent.settings import AgentConfig
from generator_service.access import Access
from generator_service.allocator import keep_freed_memory
from generator_service.app import create_app
from generator_service.connections import bounded
from generator_service.samples import held
from generator_service.service import Service
from generator_service.settings import GeneratorConfig
from protocol import config, logs, parent, tracing
from protocol.bus import QueueConfig
from protocol.errors import ConfigError, DatasetError, OnTheFlyError

log = logging.getLogger("generator_service")

DRAIN_S = 30  # that open connections get at shutdown


class Server(uvicorn.Server):
    """Stops the service when a signal asks for it, so that streams and waiting requests end by themselves."""

    def __init__(self, service: Service):
        limits = service.config.limits
        super().__init__(
            uvicorn.Config(
                create_app(service),
                http=bounded(limits.connections, limits.head_s),
                ws="none",
                timeout_keep_alive=math.ceil(limits.idle_s),
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=DRAIN_S,
            )
        )
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.should_exit:
            log.info("stopping after the current batch")
            threading.Thread(target=self._service.stop, name="stop", daemon=True).start()
        self.should_exit = True


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve; returns the exit status: 0 stopped, 1 the model failed to load, 2 settings or data are wrong."""
    options = _parser().parse_args(arguments)
    logs.setup("generator")
    tracing.setup("generator")
    keep_freed_memory()
    if options.exit_with_parent:
        parent.exit_with_parent()
    try:
        generator, agent, queue = _settings(options.config, options.set)
        with _listen(generator.host, generator.port) as listener, held(generator.samples_dir):
            service = Service(generator, agent, queue)
            resolved = {"generator": generator, "agent": agent, "broker": queue}
            config.write_resolved(resolved, generator.samples_dir / "settings.toml")
            _serve(service, listener)
        if (error := service.engine.ready.exception()) is not None:
            raise error
    except OnTheFlyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError | DatasetError) else 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m generator_service", description="Generate samples on demand.")
    parser.add_argument("--config", type=Path, help="settings file (TOML)")
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE", help="override a setting")
    parser.add_argument("--exit-with-parent", action="store_true", help="stop when standard input closes")
    return parser


def _settings(path: Path | None, overrides: Sequence[str]) -> tuple[GeneratorConfig, AgentConfig, QueueConfig]:
    settings = config.load(path, overrides)
    config.check_tables(settings, config.TABLES)
    generator = config.section(settings, "generator", GeneratorConfig)
    agent = config.section(settings, "agent", AgentConfig)
    queue = config.section(settings, "broker", QueueConfig)
    Access(generator).check_address(generator.host)
    return generator, agent, queue


def _listen(host: str, port: int) -> socket.socket:
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port} ({error.strerror}): choose another generator.host or generator.port",
            param="generator.port",
        ) from error
    log.info("listening on http://%s:%s", *listener.getsockname()[:2])
    return listener


def _serve(service: Service, listener: socket.socket) -> None:
    """Until a signal, or until the model turns out not to load."""
    server = Server(service)

    def stop_unless_ready(ready: Future[None]) -> None:
        server.should_exit |= ready.exception() is not None

    service.engine.ready.add_done_callback(stop_unless_ready)
    service.start()
    try:
        server.run(sockets=[listener])
    finally:
        service.stop()


if __name__ == "__main__":
    sys.exit(main())
