"""Models that trainers publish, so that generators are rewarded by their features."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from generator_service.routes.reply import reply
from generator_service.service import Service
from protocol.errors import InvalidRequest
from protocol.fields import Name
from protocol.published import PublishedModel, PublishedModelList

CONTENT = "application/octet-stream"
BODY = {"required": True, "content": {CONTENT: {"schema": {"type": "string", "format": "binary"}}}}


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.get("/v1/published-models")
    def published_models() -> PublishedModelList:
        """Every version that is kept."""
        return PublishedModelList(data=service.published.list())

    @routes.post(
        "/v1/published-models/{name}",
        status_code=201,
        response_model=PublishedModel,
        openapi_extra={"requestBody": BODY},
    )
    def publish(name: Name, request: Request) -> Response:
        """The next version of a name, from safetensors that say which timm model they are of. The same bytes again are
        the same version. Of a name the newest versions are kept, and those that are in use."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != CONTENT:
            raise InvalidRequest(f"the body is the file itself: send Content-Type: {CONTENT}", param="Content-Type")
        service.engine.check_ready()
        return reply(service.published.publish(name, request.scope["upload"]), 201)

    return routes
