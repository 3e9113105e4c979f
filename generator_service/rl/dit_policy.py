"""A DiT as a policy: its transformer's LoRA or all of its parameters, conditioned on the class tables of the base.

Knows nothing of rewards, rollouts or losses, nor of how weight sets are kept in memory.

    B rows, C channels of the latents, h w their height and width
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from generator_service.backends.dit import DiTBackend, Resident, conditioning
from generator_service.backends.dit_checkpoint import Tables
from generator_service.backends.dit_lora import TARGETS, add_lora, write_lora
from generator_service.backends.interface import WeightSet
from generator_service.backends.tuned_model import write_model
from generator_service.rl.trained import NAME, FullWeights, LoraWeights, Trained, TrainedPolicy, guided
from protocol.errors import InvalidRequest
from protocol.tuning import TuneJob

SHOWN_CLASSES = 5


class DiTPolicy(TrainedPolicy):
    """See `policy.Policy`.

    A LoRA begins at zero, or as a copy of the base's when that is one. All parameters: the class tables are among them.
    """

    @classmethod
    @contextmanager
    def opened(cls, backend: DiTBackend, base: WeightSet, classes: Sequence[str], job: TuneJob) -> Iterator[DiTPolicy]:
        """See `policy.Policy`. Raises InvalidRequest when the base knows other classes, or is a LoRA and all parameters
        are to be trained; WeightsCorrupt when its files do not fit."""
        if base.classes != tuple(classes):
            raise InvalidRequest(
                f"weights {base.ref} make {_listing(base.classes)}, and the dataset has {_listing(classes)}: adapt "
                "them to it with a cold start first, and give the result as base",
                param="base",
            )
        resident = backend.resident(base)
        space = resident.checkpoint
        if job.policy.parameters == "full":
            if base.kind == "lora":
                raise InvalidRequest(
                    f'weights {base.ref} are a LoRA: go on with policy.parameters = "lora", or give '
                    f"{conditioning(base).ref} as base",
                    param="base",
                )
            yield cls(base, resident, FullWeights(space.transformer, space.use, resident.tables))
            return

        def copied(name: str) -> None:
            add_lora(space.transformer, name, base.folder, conditioning(base).ref.digest, torch.float32)

        begun = copied if base.kind == "lora" else None
        with LoraWeights.added(space.transformer, space.use, job.policy.rank, TARGETS, job.seed, begun) as trained:
            yield cls(base, resident, trained)

    def __init__(self, base: WeightSet, resident: Resident, trained: Trained):
        """Use `opened`."""
        super().__init__(trained)
        self._base, self._resident = base, resident
        self.space = resident.checkpoint
        self.learned_variance = self.space.learned_variance

    def predict(
        self, latents: torch.Tensor, times: torch.Tensor, labels: torch.Tensor, guidance_scale: float
    ) -> torch.Tensor:
        """See `policy.Policy`."""
        parameters = self._trained.tuned()
        return self._predict(latents, times, labels, guidance_scale, {**self._resident.tables, **parameters})

    @torch.no_grad()
    def reference(
        self, latents: torch.Tensor, times: torch.Tensor, labels: torch.Tensor, guidance_scale: float
    ) -> torch.Tensor:
        """See `policy.Policy`."""
        with self._trained.frozen():
            return self._predict(latents, times, labels, guidance_scale, self._resident.tables)

    def _predict(
        self, latents: torch.Tensor, times: torch.Tensor, labels: torch.Tensor, guidance_scale: float, given: Tables
    ) -> torch.Tensor:
        if guidance_scale <= 1:
            return self.space.predict(latents, times, labels, given, variance=True)
        both = torch.cat([labels, torch.full_like(labels, self._resident.null)])
        output = self.space.predict(latents.repeat(2, 1, 1, 1), times.repeat(2), both, given, variance=True)
        return guided(output, guidance_scale, latents.shape[1])

    def save(self, folder: Path) -> tuple[str, dict[str, Any]]:
        """See `policy.Policy`: kind "lora", which tells all that is to be added to the transformer under it; or
        "transformer", with the class tables built in."""
        if isinstance(self._trained, LoraWeights):
            write_lora(self.space.transformer, NAME, folder, conditioning(self._base).ref.digest)
            return "lora", {}
        changed = {"num_embeds_ada_norm": self._resident.null}
        write_model(
            self.space.transformer, self.parameters, folder / "transformer", self._base.whole.ref.digest, **changed
        )
        return "transformer", {}


def _listing(classes: Sequence[str]) -> str:
    more = f" and {len(classes) - SHOWN_CLASSES} more classes" if len(classes) > SHOWN_CLASSES else ""
    return ", ".join(classes[:SHOWN_CLASSES]) + more
