"""Training runs, as their trainers tell of them, and recent samples that were made for them."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query

from generator_service.service import Service
from protocol.operations import RunList, RunStatus, ShownSampleList

RunName = Annotated[str, Path(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
SourceId = Annotated[str, Query(min_length=1, max_length=256)]
MAX_SOURCES = 32


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.get("/v1/runs")
    def runs() -> RunList:
        """Every run of the last days, the one heard from last first."""
        return RunList(data=service.bus.board.runs())

    @routes.get("/v1/runs/{run}")
    def run(run: RunName) -> RunStatus:
        return service.bus.board.run(run)

    @routes.get("/v1/runs/{run}/samples")
    def samples(
        run: RunName,
        limit: Annotated[int, Query(ge=1, le=100)] = 24,
        source: Annotated[list[SourceId] | None, Query(max_length=MAX_SOURCES)] = None,
    ) -> ShownSampleList:
        """Recent samples, newest first; `source`, which may be repeated: only those made from these."""
        return ShownSampleList(data=service.bus.board.samples(run, limit, source or ()))

    return routes
