"""How good a LoRA in training is: its loss on images held out, at noise and times that never change, and pictures.

All comes piece by piece, so that others may use the model in between. Knows nothing of optimisers, nor of when it is
asked. The adapter must be in use whenever a piece is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from generator_service.adapt import resume
from generator_service.adapt.lora_objective import Objective
from generator_service.backends import denoising
from generator_service.backends.interface import Row, Sampling
from generator_service.backends.prompt_embedding import Conditions

AT_MOST = 256  # images held out: measuring takes as long as so many rows of training, and less
PICTURES, STEPS, GUIDANCE = 4, 20, 7.5


class Validation:
    def __init__(self, objective: Objective, rows: torch.Tensor, batch_size: int, seed: int):
        """
        Args:
            rows: int64 [V], those held out, at least one. batch_size: rows predicted at once.
        """
        self._objective, self._rows = objective, rows
        self._parts = torch.arange(len(rows)).split(batch_size)
        rng = torch.Generator().manual_seed(seed)
        self._noise = torch.randn(len(rows), *objective.checkpoint.latent_shape, generator=rng)
        steps = objective.checkpoint.forward_process.config.num_train_timesteps
        evenly = (torch.arange(len(rows)) * 2 + 1) * steps // (2 * len(rows))
        self._times = evenly[torch.randperm(len(rows), generator=rng)]
        first = np.unique(objective.data.labels[rows], return_index=True)[1]
        self._shown = rows[first[:PICTURES]]  # of different classes

    @torch.no_grad()
    def losses(self) -> Iterator[float]:
        """What each batch of rows adds to the loss, which is their sum: the mean weighted denoising loss. Without the
        discrepancy, which depends on what rows share a batch."""
        for part in self._parts:
            losses = self._objective(self._rows[part], self._noise[part], self._times[part])
            yield losses.denoising.item() * len(part) / len(self._rows)

    @torch.no_grad()
    def pictures(self) -> Iterator[np.ndarray]:
        """What is made of the prompts of some of the images: uint8 [H, W, 3] each."""
        for seed, shown in enumerate(self._shown.split(1)):
            row = Row(seed=seed, label=None, guidance_scale=GUIDANCE)
            sampling = Sampling(STEPS, "ddim", guided=True)
            predictor = partial(self._predictor, shown)
            made = denoising.sample(self._objective.checkpoint, [row], sampling, predictor, lambda done, total: None)
            yield ((made[0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()

    def save(self, pictures: Sequence[np.ndarray], path: Path) -> None:
        """A PNG: those images, and below each what `pictures` made of its prompt."""
        images = self._objective.data.images[self._shown.numpy()]  # a tensor of one index would be taken for a number
        grid = np.concatenate([np.concatenate(list(row), axis=1) for row in (images, pictures)])
        with resume.spared_when_full(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(grid).save(path)

    def _predictor(self, shown: torch.Tensor, rows: Sequence[Row], guided: bool) -> denoising.Predict:
        checkpoint = self._objective.checkpoint
        told = self._objective.data.conditions(shown)
        conditions = Conditions.cat([told, checkpoint.conditions([None])])
        return lambda latents, times: checkpoint.predict(latents, times, conditions)
