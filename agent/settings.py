"""The table [agent] of a run's settings."""

from __future__ import annotations

from pydantic import Field

from agent.planner import PlannerConfig
from protocol.messages import AdaptJob


class AgentConfig(PlannerConfig):
    """The planner's settings, and what `onthefly up` starts beside the trainer."""

    adapt: AdaptJob | None = None  # done before training; None: generate with the weights that are active already
    replicas: int = Field(default=1, ge=1, le=64)  # generators on this machine, on consecutive ports
