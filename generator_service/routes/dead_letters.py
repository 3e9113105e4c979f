"""Dead letters: what failed for good, to be looked at, retried or dropped."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query

from generator_service.service import Service
from protocol.operations import DeadLetterList, DeadLetterOutcome

ID = r"^\d{1,18}-\d{1,18}$"  # two 64-bit numbers
LetterId = Annotated[str, Path(pattern=ID)]


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.get("/v1/dead-letters")
    def dead_letters(
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        before: Annotated[str | None, Query(pattern=ID)] = None,
    ) -> DeadLetterList:
        """The newest first; `before`: those older than the one of this id."""
        return service.bus.dead.newest(limit, before)

    @routes.post("/v1/dead-letters/{letter_id}/retry")
    def retry(letter_id: LetterId) -> DeadLetterOutcome:
        """Put its work unit on the queue anew; a run that still wants the samples takes them in."""
        return service.bus.dead.retry(letter_id)

    @routes.delete("/v1/dead-letters/{letter_id}")
    def drop(letter_id: LetterId) -> DeadLetterOutcome:
        """Throw it away for good."""
        return service.bus.dead.drop(letter_id)

    return routes
