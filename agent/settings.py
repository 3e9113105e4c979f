"""The table [agent] of a run's settings."""

from __future__ import annotations

from agent.planner import PlannerConfig
from protocol.messages import AdaptJob


class AgentConfig(PlannerConfig):
    """The planner's settings, and the adaptation that `onthefly up` runs before training starts."""

    adapt: AdaptJob | None = None  # None: generate with the weights that are active already
