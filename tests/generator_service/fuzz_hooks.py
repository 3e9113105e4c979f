"""Makes half of the requests that fit the document such that this service can serve them, so that their replies are
checked too: a document cannot say which classes, weights and samples there are. Loaded by schemathesis.
"""

from __future__ import annotations

import random
from typing import Any

import schemathesis
from schemathesis import Case, GenerationMode, HookContext

from tests.generator_service.tiny_dit import CLASSES

UNSERVED = ("model", "size", "quality", "style", "background", "moderation", "stream", "partial_images")
UNSERVED += ("negative_prompt", "class_label", "image", "strength", "output_compression")


@schemathesis.hook
def before_call(context: HookContext, case: Case, kwargs: dict[str, Any]) -> None:
    fits = case.meta is not None and case.meta.generation.mode is GenerationMode.POSITIVE
    if not fits or not isinstance(case.body, dict) or random.random() < 0.5:
        return
    body = case.body
    if case.operation.path == "/v1/images/generations":
        _servable(body)
    elif case.operation.path == "/v1/jobs" and isinstance(body.get("request"), dict):
        _servable(body["request"])
    elif case.operation.path == "/v1/feedback":
        body["samples"], body["model"] = [], None
        body["classes"] = [{"label": 0, "class_name": CLASSES[0], "images": random.randint(1, 20)}]


def _servable(request: dict[str, Any]) -> None:
    request.update(dict.fromkeys(UNSERVED))
    request["prompt"] = random.choice(CLASSES)
    request["seed"] = random.randint(0, 2**50)
    if request.get("num_inference_steps"):
        request["num_inference_steps"] = min(request["num_inference_steps"], 20)
