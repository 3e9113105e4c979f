"""Stable Diffusion as a policy: its UNet's LoRA or all of its parameters, conditioned on one prompt for each class.

Visual tokens of the base are used as its means of the classes, and go on into the result. Knows nothing of rewards,
rollouts or losses, nor of how weight sets are kept in memory.

    B rows, C channels of the latents, h w their height and width, D width of the text embedding
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from generator_service.adapt.lora_adapter import ATTENTION
from generator_service.backends.interface import WeightSet
from generator_service.backends.lora_sets import VISUAL_FILE, add_lora, read_class_means, write_lora
from generator_service.backends.prompt_embedding import Conditions
from generator_service.backends.sd_checkpoint import SDCheckpoint
from generator_service.backends.stable_diffusion import StableDiffusionBackend, carrier
from generator_service.backends.tuned_model import write_model
from generator_service.rl.trained import NAME, FullWeights, LoraWeights, Trained, TrainedPolicy, guided
from protocol import prompts
from protocol.errors import InvalidRequest
from protocol.tuning import TuneJob

CARRIED = ("visual", "image_encoder")  # of the base's metadata: what its visual tokens are


class StableDiffusionPolicy(TrainedPolicy):
    """See `policy.Policy`. A LoRA begins at zero, or as a copy of the base's when that is one."""

    learned_variance = False

    @classmethod
    @contextmanager
    def opened(
        cls, backend: StableDiffusionBackend, base: WeightSet, classes: Sequence[str], job: TuneJob
    ) -> Iterator[StableDiffusionPolicy]:
        """See `policy.Policy`. Raises InvalidRequest when the base has visual tokens of other classes, or is a LoRA and
        all parameters are to be trained; WeightsCorrupt when its files do not fit."""
        visual = base.metadata.get("visual", "none") != "none"
        if visual and base.classes != tuple(classes):
            raise InvalidRequest(
                f"weights {base.ref} have visual tokens of other classes than the dataset's: adapt with a LoRA to this "
                f"dataset first, or give {carrier(base).ref} as base",
                param="base",
            )
        full = job.policy.parameters == "full"
        if full and base.kind == "lora":
            raise InvalidRequest(
                f'weights {base.ref} are a LoRA: go on with policy.parameters = "lora", or give {carrier(base).ref} as '
                "base",
                param="base",
            )
        backend.load(base)  # refuses what does not fit
        checkpoint = backend.checkpoint(base)
        means = None
        if visual:
            width = checkpoint.unet.config.cross_attention_dim
            means = read_class_means(base.folder, len(classes), width).to(checkpoint.device)
        names = [prompts.fill(job.rollout.prompt, job.rollout.prompt, name, None) for name in classes]
        conditions = checkpoint.conditions(names, means)
        if full:
            yield cls(base, checkpoint, conditions, FullWeights(checkpoint.unet, checkpoint.use, {}))
            return

        def copied(name: str) -> None:
            add_lora(checkpoint.unet, base.folder, name)

        begun = copied if base.kind == "lora" else None
        with LoraWeights.added(checkpoint.unet, checkpoint.use, job.policy.rank, ATTENTION, job.seed, begun) as trained:
            yield cls(base, checkpoint, conditions, trained)

    def __init__(self, base: WeightSet, checkpoint: SDCheckpoint, conditions: Conditions, trained: Trained):
        """Use `opened`. conditions: of each class."""
        super().__init__(trained)
        self._base, self.space, self._conditions = base, checkpoint, conditions
        self._unconditional = checkpoint.conditions([None])

    def predict(
        self, latents: torch.Tensor, times: torch.Tensor, labels: torch.Tensor, guidance_scale: float
    ) -> torch.Tensor:
        """See `policy.Policy`."""
        return self._predict(latents, times, labels, guidance_scale, self._trained.tuned() or None)

    @torch.no_grad()
    def reference(
        self, latents: torch.Tensor, times: torch.Tensor, labels: torch.Tensor, guidance_scale: float
    ) -> torch.Tensor:
        """See `policy.Policy`."""
        with self._trained.frozen():
            return self._predict(latents, times, labels, guidance_scale, None)

    def _predict(
        self,
        latents: torch.Tensor,
        times: torch.Tensor,
        labels: torch.Tensor,
        guidance_scale: float,
        parameters: Mapping[str, torch.Tensor] | None,
    ) -> torch.Tensor:
        conditions = self._conditions[labels]
        if guidance_scale <= 1:
            return self.space.predict(latents, times, conditions, parameters)
        both = Conditions.cat([conditions, self._unconditional[[0] * len(labels)]])
        output = self.space.predict(latents.repeat(2, 1, 1, 1), times.repeat(2), both, parameters)
        return guided(output, guidance_scale, latents.shape[1])

    def save(self, folder: Path) -> tuple[str, dict[str, Any]]:
        """See `policy.Policy`: kind "lora", which tells all that is to be added to the UNet under it, with the visual
        tokens of the base; or "unet"."""
        if not isinstance(self._trained, LoraWeights):
            write_model(self.space.unet, self.parameters, folder / "unet", self._base.whole.ref.digest)
            return "unet", {}
        write_lora(self.space.unet, NAME, folder, configured=True)
        told = {key: self._base.metadata[key] for key in CARRIED if key in self._base.metadata}
        if told.get("visual", "none") != "none":
            shutil.copyfile(self._base.folder / VISUAL_FILE, folder / VISUAL_FILE)
        return "lora", {"visual": "none"} | told | {"checkpoint": carrier(self._base).ref.digest}
