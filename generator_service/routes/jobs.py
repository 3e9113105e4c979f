"""Long work and its progress."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Request, Response
from fastapi.responses import StreamingResponse

from generator_service import access, sse
from generator_service.jobs import JobRecord
from generator_service.routes.json_route import JsonRoute
from generator_service.routes.links import base_url
from generator_service.routes.reply import reply
from generator_service.service import Service
from protocol.messages import AdaptJob, Job, JobList, JobRequest
from protocol.policy import PolicyJob
from protocol.tuning import TuneJob
from protocol.video import VideoJob


def router(service: Service) -> APIRouter:
    routes = APIRouter(route_class=JsonRoute)

    @routes.post("/v1/jobs", status_code=202, response_model=Job)
    def submit(body: JobRequest, request: Request) -> Response:
        """Start a job; it goes on whether or not anybody waits. What makes weights wants the admin key."""
        if isinstance(body, AdaptJob | TuneJob | PolicyJob):
            access.require_admin()
            runner = service.loaded.runner
            begin = {"adapt": runner.adapt, "tune": runner.tune, "policy": runner.policy}[body.type]
            record = begin(body)
        else:
            links = base_url(request, service.config.public_url)
            if isinstance(body, VideoJob):
                record = service.loaded.runner.video(service.order_video(body.request, links))
            else:
                record = service.loaded.runner.generate(service.order(body.request, links))
        return reply(record.job, 202, {"Location": f"/v1/jobs/{record.job.id}"})

    @routes.get("/v1/jobs")
    async def jobs() -> JobList:
        """One's own jobs, for an administrator all, oldest first; their results are in `GET /v1/jobs/{id}`."""
        caller = access.current()
        mine = service.jobs.list(owner=None if caller.admin else caller.name)
        return JobList(data=[job.model_copy(update={"result": None}) for job in mine])

    @routes.get("/v1/jobs/{job_id}")
    async def job(job_id: str) -> Job:
        return _own(service, job_id).job

    @routes.delete("/v1/jobs/{job_id}", status_code=202)
    async def cancel(job_id: str) -> Job:
        """Stop a job of one's own after its current step; a finished one stays as it is."""
        record = _own(service, job_id)
        record.cancel()
        return record.job

    @routes.get("/v1/jobs/{job_id}/events", response_class=StreamingResponse)
    async def events(job_id: str, last_event_id: Annotated[str | None, Header()] = None) -> StreamingResponse:
        """Server-sent events until the job ends; with `Last-Event-ID`, those after it."""
        record, after = _own(service, job_id), sse.resume_point(last_event_id)
        record.check_resume(after)
        stream = sse.stream(record, after, service.config.keep_alive_s)
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(stream, media_type="text/event-stream", headers=headers)

    return routes


def _own(service: Service, job_id: str) -> JobRecord:
    """A job of the caller's; an administrator's are all. Raises UnknownJob and Forbidden."""
    record, caller = service.jobs.get(job_id), access.current()
    if not caller.admin:
        record.check_owner(caller.name)
    return record
