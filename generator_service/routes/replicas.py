"""The replicas of this service, and the queue that they share."""

from __future__ import annotations

from fastapi import APIRouter

from generator_service.service import Service
from protocol.operations import QueueDepths, ReplicaList


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.get("/v1/replicas")
    def replicas() -> ReplicaList:
        """Every live replica, by name; without a broker, this one."""
        return ReplicaList(data=service.membership.everyone())

    @routes.get("/v1/queue")
    def queue() -> QueueDepths:
        """How much work waits, is in work, and failed for good."""
        return QueueDepths(**service.bus.depths())

    return routes
