"""The table [agent] of a run's settings."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from agent.language import OpenAIConfig
from agent.planner import PlannerConfig
from protocol.messages import AdaptJob


class AgentConfig(PlannerConfig):
    """The planner's settings, its models, and what `onthefly up` starts beside the trainer."""

    openai: OpenAIConfig = OpenAIConfig()  # the language model of perturb = "openai"
    local: dict[str, Any] = {}  # that of perturb = "local"; checked by its Config at loading
    captioner: dict[str, Any] = {}  # the model of `onthefly caption`; checked by its Config; without one: no captions
    adapt: AdaptJob | None = None  # done before training; None: generate with the weights that are active already
    replicas: int = Field(default=1, ge=1, le=64)  # generators on this machine, on consecutive ports
