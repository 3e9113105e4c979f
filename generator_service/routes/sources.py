"""The real samples that synthetic ones are made from."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Response

from generator_service.service import Service
from generator_service.showcase import thumbnail
from protocol.errors import UnknownSample


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.get("/v1/sources/{sample_id}/image", response_class=Response)
    def image(sample_id: str, frame: Annotated[int | None, Query(ge=0)] = None) -> Response:
        """A small picture of a real sample, from the dataset that this service mounts; wants the admin key. Of a clip
        that frame, or its first."""
        dataset = service.loaded.dataset
        if dataset is None or sample_id not in dataset:
            raise UnknownSample("no such real sample here: this service mounts no dataset, or another one")
        headers = {"Cache-Control": "private, max-age=3600"}
        return Response(thumbnail(dataset.image(sample_id, frame)), media_type="image/png", headers=headers)

    return routes
