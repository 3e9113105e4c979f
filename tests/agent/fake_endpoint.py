"""An endpoint that speaks chat completions over real HTTP, and answers as the test says."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Reply:
    """One answer as it goes over the wire."""

    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


def said(text: str | None) -> Reply:
    """A chat completion."""
    message = {"role": "assistant", "content": text}
    return Reply(json.dumps({"object": "chat.completion", "choices": [{"index": 0, "message": message}]}).encode())


@dataclass
class Endpoint:
    """What it was asked, and how it does."""

    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    most_at_once: int = 0
    _inside: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def counted(self, body: dict[str, Any], headers: dict[str, str]) -> Iterator[None]:
        with self._lock:
            self.bodies.append(body)
            self.headers.append(headers)
            self._inside += 1
            self.most_at_once = max(self.most_at_once, self._inside)
        yield
        with self._lock:
            self._inside -= 1


@contextmanager
def endpoint(
    answer: Callable[[dict[str, Any]], Reply], capacity: int = 1000, latency_s: float = 0.0
) -> Iterator[Endpoint]:
    """Serve until the block ends: `capacity` answers at a time, each after `latency_s`; others wait their turn."""
    seen, room = Endpoint(), threading.Semaphore(capacity)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with seen.counted(body | {"path": self.path}, dict(self.headers)):
                with room:
                    time.sleep(latency_s)
                    reply = answer(body)
                self.send_response(reply.status)
                for name, value in {"Content-Length": str(len(reply.body)), **reply.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(reply.body)

        def log_message(self, *about: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 128

        def handle_error(self, *about: Any) -> None:
            """A caller that hung up."""

    with Server(("127.0.0.1", 0), Handler) as server:
        seen.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield seen
        finally:
            server.shutdown()
            thread.join()
