"""How far a tune job is, and what it has come to; kept in checkpoints. Knows nothing of how it learns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from generator_service.backends.interface import WeightSet
from generator_service.real_images import RealImages
from generator_service.rl.judge import Verdict
from protocol.tuning import ASIDE, TuneJob


def identity(base: WeightSet, real: RealImages, classes: Sequence[str], job: TuneJob) -> str:
    """What decides how a tune job goes; its checkpoints are for no other."""
    return "\n".join([job.model_dump_json(exclude=ASIDE), base.ref.digest, real.digest(), *classes, *real.ids])


@dataclass
class History:
    """What has happened so far."""

    step: int = 0  # rollouts done, with their updates
    good_step: int = 0  # of the last good state
    rollbacks: int = 0
    stopped: str | None = None  # what ended it early; None: nothing
    first: dict[str, Any] = field(default_factory=dict)  # what the first rollout showed
    last: dict[str, Any] = field(default_factory=dict)  # and the last one
    features: dict[str, Any] = field(default_factory=dict)  # see `Judge.features`
    seconds: float = 0.0  # what was served meanwhile counts too

    def showed(self, verdict: Verdict, kl: float) -> None:
        """Of the rollout that is being learnt from."""
        self.last = {"rewards": verdict.components, "total": verdict.total, "kl": kl, "diversity": verdict.diversity}
        self.last["nearest"] = verdict.nearest
        self.first = self.first or self.last

    def state(self) -> dict[str, Any]:
        return asdict(self)

    def metadata(self, job: TuneJob) -> dict[str, Any]:
        """What a weight set tells of its tuning. The rewards are those of the last rollout: of a set that is published
        on the way itself, and of the weights one update before the result."""
        return {
            "method": job.method,
            "step": self.step,
            **self.last,
            "first": self.first,
            "features": self.features,
            "rollbacks": self.rollbacks,
            "stopped": self.stopped,
            "seconds": self.seconds,
            "options": job.model_dump(mode="json", exclude=ASIDE),
        }


State = dict[str, torch.Tensor]
"""Of a policy, on the CPU."""
