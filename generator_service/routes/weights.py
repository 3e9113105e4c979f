"""Weight sets: what there is, and which one serves."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.concurrency import run_in_threadpool
from pydantic import Field

from generator_service.routes.json_route import JsonRoute
from generator_service.service import Service
from generator_service.weights import info
from protocol.messages import Message, WeightsInfo, WeightsList


class Activation(Message):
    """Body of `POST /v1/weights/{name}/activate`."""

    version: int | None = Field(default=None, ge=1, lt=10**9)  # None: the newest
    everywhere: bool = True  # answer once every live replica serves it; false: once this one does, and others follow
    timeout_s: float = Field(default=30.0, ge=0.0, le=600.0, allow_inf_nan=False)  # that `everywhere` may take


def router(service: Service) -> APIRouter:
    routes = APIRouter(route_class=JsonRoute)

    @routes.get("/v1/weights")
    def weights() -> WeightsList:
        """Every weight set, and the active one."""
        store = service.loaded.weights
        return WeightsList(active=store.active().ref, data=store.list())

    @routes.post("/v1/weights/{name}/activate")
    async def activate(name: str, body: Activation | None = None) -> WeightsInfo:
        """Hot swap between batches, on every replica; requests that name no weights get this set from now on.

        503 with Retry-After names the replicas that do not serve it in time; the activation stands, and asking again
        waits on.
        """
        body = body or Activation()
        store = service.loaded.weights
        chosen = await run_in_threadpool(store.resolve, name if body.version is None else f"{name}@{body.version}")
        await run_in_threadpool(service.membership.activate, chosen)
        if body.everywhere:
            await service.membership.wait_everywhere(chosen.ref, body.timeout_s)
        return info(chosen, store.active().ref)

    return routes
