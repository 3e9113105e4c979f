"""The table [agent] of a run's settings."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from agent.expressions.settings import ExpressionsConfig
from agent.language import OpenAIConfig
from agent.planner import PlannerConfig
from protocol.messages import AdaptJob
from protocol.policy import PolicyJob
from protocol.tuning import TuneJob


class AgentConfig(PlannerConfig):
    """The planner's settings, its models, and what `onthefly up` starts beside the trainer."""

    openai: OpenAIConfig = OpenAIConfig()  # the language model of perturb = "openai"
    local: dict[str, Any] = {}  # that of perturb = "local"; checked by its Config at loading
    expressions: ExpressionsConfig = ExpressionsConfig()  # of clips; only where the backend makes clips
    captioner: dict[str, Any] = {}  # the model of `onthefly caption`; checked by its Config; without one: no captions
    adapt: AdaptJob | None = None  # done before training; None: generate with the weights that are active already
    tune: TuneJob | None = None  # after that, of what came of it unless it names a base; None, or false: not tuned
    # The training waits for that, unless:
    tune_while_training: bool = False  # it begins after [agent.adapt], and is served each weight set as it is published
    policy: PolicyJob | None = None  # of clips, learnt after both, for what came of them unless it names a base; None,
    # or false: not learnt
    replicas: int = Field(default=1, ge=1, le=64)  # generators on this machine, on consecutive ports

    @field_validator("tune", "policy", mode="before")
    @classmethod
    def _or_false(cls, value: Any) -> Any:
        """TOML has no null to take back a table that a file includes."""
        return None if value is False else value

    @model_validator(mode="after")
    def _tunes_what_is_served(self) -> AgentConfig:
        if self.tune_while_training and self.tune is None:
            raise ValueError("there is nothing to tune while training: add a table [agent.tune]")
        if self.tune_while_training and not (self.tune.activate and self.tune.publish_every):
            raise ValueError(
                "what is tuned while training is to be served before it is done: set tune.activate = true, and "
                "tune.publish_every to the rollouts between two weight sets"
            )
        return self

    @model_validator(mode="after")
    def _learns_for_what_is_done(self) -> AgentConfig:
        if self.tune_while_training and self.policy is not None:
            raise ValueError(
                "a policy is learnt before training, for a generator that stays as it is: set tune_while_training = "
                "false, or policy = false"
            )
        return self
