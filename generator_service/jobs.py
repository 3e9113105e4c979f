"""The job table: what long work was asked for, how far it is, and its events.

Written by whoever runs a job (any thread), read by HTTP handlers (an event loop). Does not know what a job does nor how
it is stopped: cancelling is a callable given from outside.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from typing import Any

from protocol.errors import Cancelled, Forbidden, InvalidRequest, OnTheFlyError, QueueFull, UnknownJob
from protocol.messages import Job, JobEvent, JobStatus

FINISHED = ("succeeded", "failed", "cancelled")
MAX_EVENT_BYTES = 2**22  # of a job's progress that is kept: some of it is pictures


class JobRecord:
    """One job and its event log. Thread-safe."""

    def __init__(self, kind: str, steps: int | None, max_events: int, owner: str):
        self.owner = owner
        self.size = 0  # bytes of its result and of its events, once it has ended
        self._lock = threading.Lock()
        self._job = Job(id=uuid.uuid4().hex, type=kind, status="queued", created=time.time(), steps=steps)
        self._events: deque[tuple[JobEvent, int]] = deque()  # and the bytes that it counts for
        self._max_events, self._events_size = max_events, 0
        self._followers: dict[asyncio.Event, asyncio.AbstractEventLoop] = {}
        self._cancel: Callable[[], None] | None = None
        self._cancel_asked = False
        self._seq = 0
        with self._lock:
            self._log("status", {"status": "queued"})

    @property
    def job(self) -> Job:
        return self._job

    @property
    def finished(self) -> bool:
        return self._job.status in FINISHED

    # ------------------------------------------------------------ written by the runner

    def on_cancel(self, cancel: Callable[[], None]) -> None:
        """How to stop this job; called at most once, at once when that was asked for already."""
        with self._lock:
            self._cancel = cancel
            asked = self._cancel_asked
        if asked:
            cancel()

    def progress(self, step: int, steps: int, **data: Any) -> None:
        """One step done, or something told of an earlier one. The first call turns the job to running."""
        with self._lock:
            if self.finished:
                return
            if self._job.status == "queued":
                self._update(status="running", started=time.time())
                self._log("status", {"status": "running"})
            self._update(step=max(step, self._job.step), steps=steps)
            self._log("progress", {"step": step, "steps": steps, **data})

    def succeed(self, result: dict[str, Any]) -> None:
        self._finish("succeeded", result=result)

    def fail(self, error: OnTheFlyError) -> None:
        """End the job; Cancelled ends it as cancelled."""
        self._finish("cancelled" if isinstance(error, Cancelled) else "failed", problem=error.to_problem())

    def _finish(self, status: JobStatus, **outcome: Any) -> None:
        with self._lock:
            if self.finished:
                return
            self._update(status=status, finished=time.time(), **outcome)
            self._log("end", self._job.model_dump(mode="json"))
            self.size = len(self._job.model_dump_json()) + self._events_size
            self._cancel = None

    # ------------------------------------------------------------ read by handlers

    def check_owner(self, caller: str) -> None:
        """Raises Forbidden: it is somebody else's."""
        if caller != self.owner:
            raise Forbidden("this job is somebody else's: only its owner and an administrator may see or cancel it")

    def cancel(self) -> None:
        """Ask the runner to stop; the job ends when it did. A finished job stays as it is."""
        with self._lock:
            first = not (self._cancel_asked or self.finished)
            self._cancel_asked = True
            cancel = self._cancel
        if first and cancel is not None:
            cancel()

    def check_resume(self, after: int) -> None:
        """Raises InvalidRequest when this job has had no event `after` yet."""
        if after > self._seq:
            raise InvalidRequest(
                f"this job has had {self._seq} events so far, and no {after}: it is another job's",
                param="Last-Event-ID",
            )

    async def follow(self, after: int, keep_alive_s: float) -> AsyncIterator[JobEvent | None]:
        """Events with seq > `after`, in order, until the end; None each `keep_alive_s` without one. Where some of them
        are not kept any more, one of kind "skipped" says which."""
        changed = asyncio.Event()
        with self._lock:
            self._followers[changed] = asyncio.get_running_loop()
        try:
            while True:
                changed.clear()
                with self._lock:
                    fresh = [event for event, _ in self._events if event.seq > after]
                if fresh and fresh[0].seq > after + 1:
                    yield self._skipped(after + 1, fresh[0].seq - 1)
                for event in fresh:
                    yield event
                    after = event.seq
                if (fresh and fresh[-1].kind == "end") or (not fresh and self.finished):
                    return
                try:
                    await asyncio.wait_for(changed.wait(), keep_alive_s)
                except TimeoutError:
                    yield None
        finally:
            with self._lock:
                del self._followers[changed]

    def _skipped(self, first: int, last: int) -> JobEvent:
        data = {"first": first, "last": last}
        return JobEvent(seq=last, job=self._job.id, kind="skipped", time=time.time(), data=data)

    # ------------------------------------------------------------ with the lock held

    def _update(self, **fields: Any) -> None:
        self._job = self._job.model_copy(update=fields)

    def _log(self, kind: str, data: dict[str, Any]) -> None:
        self._seq += 1
        event = JobEvent(seq=self._seq, job=self._job.id, kind=kind, time=time.time(), data=data)
        size = len(json.dumps(data)) if kind == "progress" else 0  # the result at the end is counted elsewhere
        self._events.append((event, size))
        self._events_size += size
        while len(self._events) > self._max_events or (self._events_size > MAX_EVENT_BYTES and len(self._events) > 1):
            self._events_size -= self._events.popleft()[1]
        for changed, loop in self._followers.items():
            loop.call_soon_threadsafe(changed.set)


class JobTable:
    """Jobs by id, newest last. Finished ones go when there are too many. Thread-safe."""

    def __init__(
        self,
        max_jobs: int = 1000,
        max_unfinished: int = 100,
        max_events: int = 1000,
        max_own: int | None = None,
        max_result_bytes: int = 2**28,
    ):
        """
        Args:
            max_jobs: jobs remembered, finished ones included.
            max_unfinished: jobs queued or running; one more raises QueueFull.
            max_events: events kept of each job, the latest ones.
            max_own: jobs queued or running of one owner; None: all that there may be.
            max_result_bytes: of finished jobs, with their events.
        """
        self._lock = threading.Lock()
        self._records: OrderedDict[str, JobRecord] = OrderedDict()
        self._max_jobs, self._max_unfinished, self._max_events = max_jobs, max_unfinished, max_events
        self._max_own = max_unfinished if max_own is None else max_own
        self._max_result_bytes = max_result_bytes

    def create(self, kind: str, steps: int | None = None, owner: str = "") -> JobRecord:
        """Raises QueueFull. Old jobs that ended make room for the new one."""
        record = JobRecord(kind, steps, self._max_events, owner)
        with self._lock:
            unfinished = [known for known in self._records.values() if not known.finished]
            own = sum(known.owner == owner for known in unfinished)
            if len(unfinished) >= self._max_unfinished or own >= self._max_own:
                raise QueueFull(
                    f"{len(unfinished)} jobs wait or run already, {own} of them yours: try again later, or cancel some"
                )
            self._records[record.job.id] = record
            self._make_room()
        return record

    def _make_room(self) -> None:
        jobs, size = len(self._records), sum(record.size for record in self._records.values())
        for key, record in list(self._records.items()):
            if jobs <= self._max_jobs and size <= self._max_result_bytes:
                return
            if record.finished:
                del self._records[key]
                jobs, size = jobs - 1, size - record.size

    def get(self, job_id: str) -> JobRecord:
        """Raises UnknownJob."""
        with self._lock:
            record = self._records.get(job_id)
        if record is None:
            raise UnknownJob(f"no job {job_id!r} here: another replica has it, or it ended too long ago")
        return record

    def list(self, owner: str | None = None) -> list[Job]:
        """Oldest first; of one owner, or of all."""
        with self._lock:
            return [record.job for record in self._records.values() if owner is None or record.owner == owner]

    def discard(self, record: JobRecord) -> None:
        """Forget a job that could not be started."""
        with self._lock:
            del self._records[record.job.id]
