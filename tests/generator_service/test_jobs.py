from __future__ import annotations

import asyncio
import threading

import pytest

from generator_service.jobs import JobRecord, JobTable
from protocol.errors import Cancelled, GenerationFailed, QueueFull, UnknownJob
from protocol.messages import JobEvent


def collect(record: JobRecord, after: int = 0) -> list[JobEvent]:
    async def read() -> list[JobEvent]:
        return [event async for event in record.follow(after, 60.0) if event is not None]

    return asyncio.run(read())


def finished_job(table: JobTable, steps: int = 3) -> JobRecord:
    record = table.create("generate")
    for step in range(1, steps + 1):
        record.progress(step, steps)
    record.succeed({"ok": True})
    return record


def test_events_tell_the_whole_story_in_order():
    record = finished_job(JobTable())
    events = collect(record)
    assert [event.seq for event in events] == list(range(1, 7))
    assert [event.kind for event in events] == ["status", "status", "progress", "progress", "progress", "end"]
    assert [event.data["step"] for event in events[2:5]] == [1, 2, 3]
    assert events[-1].data["result"] == {"ok": True}
    assert record.job.status == "succeeded"
    assert record.job.created <= record.job.started <= record.job.finished


def test_what_is_told_of_an_earlier_step_takes_nothing_back():
    record = JobTable().create("tune", 9)
    record.progress(5, 9, loss=0.5)
    record.progress(4, 9, weights="better@1")
    assert record.job.step == 5
    record.succeed({})
    assert [event.data["step"] for event in collect(record) if event.kind == "progress"] == [5, 4]


def test_following_goes_on_after_a_seq_and_ends_at_once_after_the_last():
    record = finished_job(JobTable())
    assert [event.seq for event in collect(record, after=4)] == [5, 6]
    assert collect(record, after=6) == []
    assert collect(record, after=99) == []


def test_the_log_is_bounded_and_keeps_the_latest():
    record = finished_job(JobTable(max_events=3), steps=10)
    events = collect(record)
    assert [event.kind for event in events] == ["skipped", "progress", "progress", "end"]
    assert events[0].data == {"first": 1, "last": events[1].seq - 1}
    assert collect(record, after=events[1].seq) == events[2:]


def test_a_follower_is_woken_by_another_thread():
    record = JobTable().create("adapt")

    async def read() -> list[str]:
        kinds = []
        async for event in record.follow(0, 60.0):
            kinds.append(event.kind)
            if len(kinds) == 1:
                threading.Thread(target=lambda: (record.progress(1, 1, loss=0.5), record.succeed({}))).start()
        return kinds

    assert asyncio.run(read()) == ["status", "status", "progress", "end"]


def test_a_silent_job_gives_keep_alives():
    record = JobTable().create("adapt")

    async def read() -> list[JobEvent | None]:
        stream = record.follow(1, 0.01)
        found = [await anext(stream), await anext(stream)]
        await stream.aclose()
        return found

    assert asyncio.run(read()) == [None, None]


def test_cancel_reaches_the_runner_once_whenever_it_says_how():
    calls = []
    early, late = JobTable().create("a"), JobTable().create("b")
    early.on_cancel(lambda: calls.append("early"))
    early.cancel()
    early.cancel()
    late.cancel()
    late.on_cancel(lambda: calls.append("late"))
    assert calls == ["early", "late"]
    late.fail(Cancelled("stopped"))
    assert (late.job.status, late.job.problem["error"]["code"]) == ("cancelled", "cancelled")


def test_an_ended_job_stays_as_it_is():
    record = finished_job(JobTable())
    before = record.job
    record.cancel()
    record.fail(GenerationFailed("late"))
    record.progress(1, 3)
    assert record.job == before


def test_the_table_is_bounded_by_forgetting_finished_jobs_only():
    table = JobTable(max_jobs=2, max_unfinished=2)
    running = table.create("adapt")
    first, second = finished_job(table), finished_job(table)
    assert [job.id for job in table.list()] == [running.job.id, second.job.id]
    with pytest.raises(UnknownJob):
        table.get(first.job.id)
    table.create("adapt")
    with pytest.raises(QueueFull):
        table.create("adapt")
