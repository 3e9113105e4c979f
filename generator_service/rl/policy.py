"""A generator as a policy: what of it is trained, what it predicts, and the frozen one that it started from.

One implementation a backend (`dit_policy`, `sd_policy`), named in `generator_service.registry.POLICIES`. Knows nothing
of rewards, rollouts or losses.

    B rows, C channels of the latents, h w their height and width
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch

from generator_service.backends.denoising import LatentSpace
from generator_service.backends.interface import Backend, WeightSet
from protocol.tuning import TuneJob


class Policy(Protocol):
    """Open with `SomePolicy.opened(backend, base, classes, job)`, a context manager: at its end, the backend's own
    model is as it was. Its tuned weights count inside `in_use` only, so that the backend may serve others between."""

    space: LatentSpace  # device, latent_shape, scheduler, decode
    parameters: Mapping[str, torch.nn.Parameter]  # what is trained, in float32, whatever the model's own type
    learned_variance: bool  # its output has a second half of channels that tell the variance of a reverse step

    @classmethod
    def opened(
        cls, backend: Backend, base: WeightSet, classes: Sequence[str], job: TuneJob
    ) -> AbstractContextManager[Policy]:
        """Raises InvalidRequest when the base knows other classes, or is of a kind that cannot be tuned."""
        ...

    def in_use(self) -> AbstractContextManager[None]:
        """Predictions are those of the tuned weights, whose parameters take gradients, and of the reference. Backward
        passes belong inside too, and the backend serves nobody between a prediction and its own."""
        ...

    def predict(
        self, latents: torch.Tensor, times: torch.Tensor, labels: torch.Tensor, guidance_scale: float
    ) -> torch.Tensor:
        """What the tuned model says, guided: float32 [B, C or 2C, h, w], differentiable in `parameters`.

        The conditional and the unconditional pass are one call. Of a learned variance, the second half is the
        conditional pass's.

        Args:
            latents: float32 [B, C, h, w]. times: int64 [B], of the schedule. labels: int64 [B]. guidance_scale: 1 or
                less: one pass, without guidance.
        """
        ...

    def reference(
        self, latents: torch.Tensor, times: torch.Tensor, labels: torch.Tensor, guidance_scale: float
    ) -> torch.Tensor:
        """What the frozen base says to the same; without gradients."""
        ...

    def state(self) -> dict[str, torch.Tensor]:
        """A copy of the parameters, on the CPU."""
        ...

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """What `state` gave."""
        ...

    def save(self, folder: Path) -> tuple[str, dict[str, Any]]:
        """Write the weight set as the backend serves it on top of `base`; its kind, and metadata of it."""
        ...
