"""The HTTP application: routes, middleware and error handlers around a service. No globals, no torch."""

from __future__ import annotations

from fastapi import FastAPI

from generator_service import problems, routes
from generator_service.access import Access
from generator_service.idempotency import IdempotencyStore
from generator_service.limits import Bodies, RateLimit
from generator_service.middleware import Authorized, Bounded, Idempotent
from generator_service.observed import Observed
from generator_service.service import Service
from generator_service.uploads import Uploads


def create_app(service: Service) -> FastAPI:
    """The app of one service; the caller starts and stops the service. Raises ConfigError: its keys are unusable."""
    config, limits = service.config, service.config.limits
    app = FastAPI(title="onthefly generator", description="Synthetic training data on demand.")
    app.state.body_values = limits.body_values
    problems.install(app)
    app.include_router(routes.router(service))
    # the last one added is the first one passed
    app.add_middleware(Idempotent, store=IdempotencyStore())
    app.add_middleware(
        Bounded,
        max_body_bytes=config.max_body_bytes,
        max_feedback_bytes=config.max_feedback_bytes,
        body_s=limits.body_s,
        bodies=Bodies(limits.bodies_bytes),
        uploads=Uploads(service.published.uploads, config.max_model_bytes),
    )
    app.add_middleware(Authorized, access=Access(config), rate=RateLimit(limits.requests_per_minute, limits.burst))
    app.add_middleware(Observed, telemetry=service.telemetry)
    return app
