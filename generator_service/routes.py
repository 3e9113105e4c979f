"""The routes. HTTP only: what they ask for is done by the service. No torch."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Header, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import Field

from generator_service import sse
from generator_service.batching import Generated, Generation
from generator_service.engine import Engine
from generator_service.service import Service
from generator_service.weights import info
from protocol.entries import Sample
from protocol.messages import (
    AdaptJob,
    Feedback,
    FeedbackAccepted,
    ImageGenerationRequest,
    ImagesResponse,
    Job,
    JobList,
    JobRequest,
    Message,
    WeightsInfo,
    WeightsList,
)

PROBLEM = {"description": "Problem document (RFC 9457)", "content": {"application/problem+json": {}}}
ERRORS = dict.fromkeys((401, 404, 409, 413, 422, 429, 500, 503), PROBLEM)


class Activation(Message):
    """Body of `POST /v1/weights/{name}/activate`."""

    version: int | None = Field(default=None, ge=1, lt=10**9)  # None: the newest


def router(service: Service) -> APIRouter:
    """All routes of a service."""
    routes = APIRouter(responses=ERRORS)
    _health(routes, service)
    _images(routes, service)
    _jobs(routes, service)
    _feedback_and_weights(routes, service)
    _samples(routes, service)
    return routes


def _health(routes: APIRouter, service: Service) -> None:
    @routes.get("/livez")
    async def livez() -> dict[str, str]:
        """The process answers."""
        return {"status": "alive"}

    @routes.get("/readyz")
    async def readyz() -> dict[str, str]:
        """A real forward pass succeeded."""
        service.engine.check_ready()
        return {"status": "ready"}

    @routes.get("/metrics", response_class=Response)
    def metrics() -> Response:
        """Prometheus metrics."""
        return Response(service.metrics(), media_type=CONTENT_TYPE_LATEST)


def _images(routes: APIRouter, service: Service) -> None:
    @routes.post("/v1/images/generations", response_model=ImagesResponse)
    async def generate(body: ImageGenerationRequest, request: Request) -> Response:
        """Images now; OpenAI's images API. Going away cancels them, unless an Idempotency-Key was sent."""
        order = await run_in_threadpool(service.order, body)
        generation = Generation(order.weights, order.sampling, order.rows)
        service.engine.submit(generation)
        generated = await _unless_disconnected(request, service.engine, generation)
        return _reply(await run_in_threadpool(service.loaded.recorder.images_response, order, generated))


def _jobs(routes: APIRouter, service: Service) -> None:
    @routes.post("/v1/jobs", status_code=202, response_model=Job)
    def submit(body: JobRequest) -> Response:
        """Start a job; it goes on whether or not anybody waits."""
        runner = service.loaded.runner
        record = runner.adapt(body) if isinstance(body, AdaptJob) else runner.generate(service.order(body.request))
        return _reply(record.job, 202, {"Location": f"/v1/jobs/{record.job.id}"})

    @routes.get("/v1/jobs")
    async def jobs() -> JobList:
        """All jobs remembered, oldest first, without their results: those are in `GET /v1/jobs/{id}`."""
        return JobList(data=[job.model_copy(update={"result": None}) for job in service.jobs.list()])

    @routes.get("/v1/jobs/{job_id}")
    async def job(job_id: str) -> Job:
        return service.jobs.get(job_id).job

    @routes.delete("/v1/jobs/{job_id}", status_code=202)
    async def cancel(job_id: str) -> Job:
        """Stop a job after its current step; a finished one stays as it is."""
        record = service.jobs.get(job_id)
        record.cancel()
        return record.job

    @routes.get("/v1/jobs/{job_id}/events", response_class=StreamingResponse)
    async def events(job_id: str, last_event_id: Annotated[str | None, Header()] = None) -> StreamingResponse:
        """Server-sent events until the job ends; with `Last-Event-ID`, those after it."""
        record = service.jobs.get(job_id)
        stream = sse.stream(record, sse.resume_point(last_event_id), service.config.keep_alive_s)
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(stream, media_type="text/event-stream", headers=headers)


def _feedback_and_weights(routes: APIRouter, service: Service) -> None:
    @routes.post("/v1/feedback", status_code=202)
    def feedback(body: Feedback) -> FeedbackAccepted:
        """Plan a trainer's feedback and queue the work; the same one again gets the same answer."""
        service.engine.check_ready()
        return service.loaded.desk.accept(body)

    @routes.get("/v1/weights")
    def weights() -> WeightsList:
        """Every weight set, and the active one."""
        store = service.loaded.weights
        return WeightsList(active=store.active().ref, data=store.list())

    @routes.post("/v1/weights/{name}/activate")
    def activate(name: str, body: Activation | None = None) -> WeightsInfo:
        """Hot swap between batches; requests that name no weights get this set from now on."""
        store = service.loaded.weights
        version = body.version if body is not None else None
        chosen = store.resolve(name if version is None else f"{name}@{version}")
        service.loaded.runner.activate(chosen)
        return info(chosen, store.active().ref)


def _samples(routes: APIRouter, service: Service) -> None:
    @routes.get("/v1/samples/{sample_id}")
    def sample(sample_id: str) -> Sample:
        """Where a synthetic sample came from."""
        return service.samples.get(sample_id)

    @routes.get("/v1/samples/{sample_id}/image", response_class=Response)
    def image(sample_id: str) -> Response:
        """Its pixels, if it was made for a request here."""
        data, media_type = service.samples.image(sample_id)
        return Response(data, media_type=media_type)


async def _unless_disconnected(request: Request, engine: Engine, generation: Generation) -> Generated:
    """The generation's outcome; when the client goes away first, its rows are cancelled."""
    result = asyncio.wrap_future(generation.future)
    gone = asyncio.ensure_future(request.receive())  # the body is read: the next message is the disconnect
    try:
        await asyncio.wait({result, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        if not result.done():
            engine.cancel(generation)
    return await result


def _reply(body: Message, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A message as JSON, serialised once."""
    return Response(body.model_dump_json(), status, headers, media_type="application/json")
