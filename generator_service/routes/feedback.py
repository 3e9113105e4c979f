"""What a trainer finds hard."""

from __future__ import annotations

from fastapi import APIRouter

from generator_service.routes.json_route import JsonRoute
from generator_service.service import Service
from protocol.messages import Feedback, FeedbackAccepted


def router(service: Service) -> APIRouter:
    routes = APIRouter(route_class=JsonRoute)

    @routes.post("/v1/feedback", status_code=202)
    def feedback(body: Feedback) -> FeedbackAccepted:
        """Plan a trainer's feedback and queue the work; the same one again gets the same answer."""
        service.engine.check_ready()
        return service.loaded.desk.accept(body)

    return routes
