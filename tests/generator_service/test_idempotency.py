from __future__ import annotations

import asyncio

import pytest

from generator_service.idempotency import IdempotencyStore, Reply
from protocol.errors import IdempotencyConflict


class Handler:
    """Counts its calls; each answers when `go` is set."""

    def __init__(self, status: int = 200, size: int = 10):
        self.calls = 0
        self.go = asyncio.Event()
        self._status, self._size = status, size

    async def __call__(self) -> Reply:
        self.calls += 1
        number = self.calls
        await self.go.wait()
        return Reply(self._status, [], str(number).encode() * self._size)


def test_a_second_request_in_flight_waits_for_the_first_and_gets_its_reply():
    async def scenario() -> None:
        store, handler = IdempotencyStore(), Handler()
        both = asyncio.gather(store.reply("k", b"body", handler), store.reply("k", b"body", handler))
        await asyncio.sleep(0)
        handler.go.set()
        first, second = await both
        assert first is second and handler.calls == 1
        assert await store.reply("k", b"body", handler) is first

    asyncio.run(scenario())


def test_the_same_key_with_another_body_is_a_conflict_also_in_flight():
    async def scenario() -> None:
        store, handler = IdempotencyStore(), Handler()
        first = asyncio.create_task(store.reply("k", b"body", handler))
        await asyncio.sleep(0)
        with pytest.raises(IdempotencyConflict):
            await store.reply("k", b"other", handler)
        handler.go.set()
        await first
        with pytest.raises(IdempotencyConflict):
            await store.reply("k", b"other", handler)

    asyncio.run(scenario())


@pytest.mark.parametrize(("status", "calls"), [(200, 1), (422, 1), (429, 2), (500, 2), (503, 2)])
def test_replies_that_may_change_are_not_kept(status: int, calls: int):
    async def scenario() -> None:
        store, handler = IdempotencyStore(), Handler(status)
        handler.go.set()
        for _ in range(2):
            await store.reply("k", b"body", handler)
        assert handler.calls == calls

    asyncio.run(scenario())


def test_a_caller_that_gives_up_does_not_stop_the_request():
    async def scenario() -> None:
        store, handler = IdempotencyStore(), Handler()
        first = asyncio.create_task(store.reply("k", b"body", handler))
        await asyncio.sleep(0)
        first.cancel()
        handler.go.set()
        assert (await store.reply("k", b"body", handler)).status == 200
        assert handler.calls == 1

    asyncio.run(scenario())


def test_memory_is_bounded_in_bytes_and_in_replies():
    async def scenario(store: IdempotencyStore, kept: list[str]) -> None:
        handlers = {}
        for key in ("a", "b", "c"):
            handlers[key] = Handler(size=10)
            handlers[key].go.set()
            await store.reply(key, b"", handlers[key])
        for key, handler in reversed(handlers.items()):
            await store.reply(key, b"", handler)
            assert (handler.calls == 1) == (key in kept), key

    asyncio.run(scenario(IdempotencyStore(max_bytes=25), ["b", "c"]))
    asyncio.run(scenario(IdempotencyStore(max_replies=1), ["c"]))


def test_a_handler_that_raises_is_forgotten():
    async def broken() -> Reply:
        raise RuntimeError("bug")

    async def scenario() -> None:
        store, handler = IdempotencyStore(), Handler()
        handler.go.set()
        with pytest.raises(RuntimeError):
            await store.reply("k", b"", broken)
        assert (await store.reply("k", b"", handler)).status == 200

    asyncio.run(scenario())
