"""Images now."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool

from generator_service import access
from generator_service.batching import Generated, Generation
from generator_service.engine import Engine
from generator_service.routes.json_route import JsonRoute
from generator_service.routes.links import base_url
from generator_service.routes.reply import reply
from generator_service.service import Service
from protocol.messages import ImageGenerationRequest, ImagesResponse


def router(service: Service) -> APIRouter:
    routes = APIRouter(route_class=JsonRoute)

    @routes.post("/v1/images/generations", response_model=ImagesResponse)
    async def generate(body: ImageGenerationRequest, request: Request) -> Response:
        """Images now; OpenAI's images API. Going away cancels them, unless an Idempotency-Key was sent."""
        order = await run_in_threadpool(service.order, body, base_url(request, service.config.public_url))
        generation = Generation(order.weights, order.sampling, order.rows, owner=access.current().name)
        service.engine.submit(generation)
        generated = await _unless_disconnected(request, service.engine, generation)
        return reply(await run_in_threadpool(service.loaded.recorder.images_response, order, generated))

    return routes


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
