"""Server-sent events of a job: resumable by `Last-Event-ID`, with comments that keep idle connections open."""

from __future__ import annotations

from collections.abc import AsyncIterator

from generator_service.jobs import JobRecord
from protocol.errors import InvalidRequest


def resume_point(last_event_id: str | None) -> int:
    """The seq to go on after; 0 without the header. Raises InvalidRequest."""
    if last_event_id is None:
        return 0
    if not (last_event_id.isascii() and last_event_id.isdecimal() and len(last_event_id) < 19):
        raise InvalidRequest("Last-Event-ID must be the id of an event of this job, a number", param="Last-Event-ID")
    return int(last_event_id)


async def stream(record: JobRecord, after: int, keep_alive_s: float) -> AsyncIterator[str]:
    """Events after seq `after` as text/event-stream, until the job's end."""
    async for event in record.follow(after, keep_alive_s):
        if event is None:
            yield ": keep-alive\n\n"
        else:
            yield f"id: {event.seq}\nevent: {event.kind}\ndata: {event.model_dump_json()}\n\n"
