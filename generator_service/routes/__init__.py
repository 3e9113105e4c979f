"""The routes, one file a subject. HTTP only: what they ask for is done by the service. No torch."""

from __future__ import annotations

from fastapi import APIRouter, Security
from fastapi.security import HTTPBearer

from generator_service.routes import (
    dead_letters,
    feedback,
    health,
    images,
    jobs,
    page,
    published_models,
    replicas,
    runs,
    samples,
    sources,
    weights,
)
from generator_service.service import Service

PROBLEM = {"description": "Problem document (RFC 9457)", "content": {"application/problem+json": {}}}
ERRORS = dict.fromkeys((401, 403, 404, 408, 409, 410, 413, 422, 429, 500, 503, 507), PROBLEM)
MODELS = (weights, published_models)
SUBJECTS = (health, images, jobs, feedback, *MODELS, samples, sources, replicas, runs, dead_letters, page)
OPEN = (health, page)  # answered without a key, all or part of them: see `access`


def router(service: Service) -> APIRouter:
    """All routes of a service."""
    routes = APIRouter(responses=ERRORS)
    bearer = Security(HTTPBearer(auto_error=False))  # for the documentation: the middleware looks at the key
    for subject in SUBJECTS:
        routes.include_router(subject.router(service), dependencies=[] if subject in OPEN else [bearer])
    return routes
