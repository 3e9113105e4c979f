"""The HTTP application: routes, middleware and error handlers around a service. No globals, no torch."""

from __future__ import annotations

import os

from fastapi import FastAPI

from generator_service import problems, routes
from generator_service.idempotency import IdempotencyStore
from generator_service.middleware import Authorized, Bounded, Idempotent, Measured
from generator_service.service import Service

KEY_VARIABLE = "ONTHEFLY_API_KEY"


def create_app(service: Service) -> FastAPI:
    """The app of one service; the caller starts and stops the service."""
    app = FastAPI(title="onthefly generator", description="Synthetic training data on demand.")
    problems.install(app)
    app.include_router(routes.router(service))
    # the last one added is the first one passed
    app.add_middleware(Idempotent, store=IdempotencyStore())
    app.add_middleware(Bounded, max_body_bytes=service.config.max_body_bytes)
    app.add_middleware(Authorized, api_key=service.config.api_key or os.environ.get(KEY_VARIABLE) or None)
    app.add_middleware(Measured, telemetry=service.telemetry)
    return app
