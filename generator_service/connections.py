"""How many connections there may be, and how long one may take to say what it wants.

Between the sockets and the application: a connection that sends nothing, or a request's first lines one byte at a time,
never gets so far that the application could end it. Knows nothing of requests.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

BUSY = (
    b"HTTP/1.1 503 Service Unavailable\r\n"
    b"Content-Type: text/plain\r\nContent-Length: 21\r\nRetry-After: 1\r\nConnection: close\r\n\r\n"
    b"too many connections\n"
)


def bounded(limit: int, head_s: float) -> type[H11Protocol]:
    """uvicorn's protocol for HTTP/1.1, with bounds.

    Args:
        limit: connections open at a time; one more is told to come back.
        head_s: seconds for the first lines of a connection's first request, and of each one that it begins to send.
    """

    class Bounded(H11Protocol):
        _head: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > limit:
                transport.write(BUSY)
                transport.close()
            else:
                self._await_head()

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return
            if self._head is None and not self._has_request():
                self._await_head()
            super().data_received(data)
            if self._has_request():
                self._stop_awaiting()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_awaiting()
            super().connection_lost(exc)

        def _has_request(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def _await_head(self) -> None:
            self._head = self.loop.call_later(head_s, self.transport.close)

        def _stop_awaiting(self) -> None:
            if self._head is not None:
                self._head.cancel()
                self._head = None

    return Bounded
