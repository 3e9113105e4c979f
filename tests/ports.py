"""Ports for servers that are started later, and again and again."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack, suppress

RANGE = range(20_000, 32_000)  # below those that systems give to connections, which would take a port meanwhile


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 on which nobody listens; no two are the same."""
    found: list[int] = []
    with ExitStack() as probes:
        while len(found) < count:
            port = random.SystemRandom().choice(RANGE)
            with suppress(OSError):
                probes.enter_context(socket.create_server(("127.0.0.1", port)))
                found.append(port)
    return found


def free_port() -> int:
    """One of them."""
    return free_ports(1)[0]
