"""Samples and where they came from."""

from __future__ import annotations

from fastapi import APIRouter, Response

from generator_service.service import Service
from protocol.entries import Sample


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.get("/v1/samples/{sample_id}")
    def sample(sample_id: str) -> Sample:
        """Where a synthetic sample came from."""
        return service.samples.get(sample_id)

    @routes.get("/v1/samples/{sample_id}/image", response_class=Response)
    def image(sample_id: str) -> Response:
        """Its pixels, if it was made for a request here."""
        data, media_type = service.samples.image(sample_id)
        return Response(data, media_type=media_type)

    return routes
