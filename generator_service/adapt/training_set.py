"""The real images as an adaptation by text sees them: latents, prompts and visual tokens, and which are held out.

Latents and text embeddings are computed when they are first wanted, one row at a time: the cost spreads over the first
steps, and no bit depends on the order of use. What is kept lies in the CPU's memory: of each prompt the embedding in
the text encoder's type, some 120 kB of SD 1.5's in half precision. Knows nothing of losses, noise or optimisers.

    N images, D width of the text embedding
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch

from generator_service.backends.prompt_embedding import Conditions
from generator_service.backends.sd_checkpoint import SDCheckpoint
from generator_service.real_images import RealImages
from protocol import prompts
from protocol.messages import LoraOptions


def held_out(labels: np.ndarray, part: float, at_most: int, seed: int) -> np.ndarray:
    """Which images are not trained on: bool [N], in each class about the same part, and never all of a class.

    Args:
        labels: int64 [N]. part: of all images, 0 to 1. at_most: images in all.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # class by class, in random order within
    first = np.unique(labels[order], return_index=True)[1]
    candidates = np.delete(order, first)
    count = min(round(part * len(labels)), at_most, len(candidates))
    chosen = np.zeros(len(labels), dtype=bool)
    chosen[candidates[(np.arange(count) * 2 + 1) * len(candidates) // (2 * max(count, 1))]] = True  # evenly along it
    return chosen


def class_means(features: torch.Tensor, labels: np.ndarray, classes: int) -> torch.Tensor:
    """Mean feature of each class, float32 [classes, D]; NaN for one without images. features: [N, D]."""
    membership = torch.from_numpy(labels).to(features.device) == torch.arange(classes, device=features.device)[:, None]
    return membership.to(features) @ features / membership.sum(1, keepdim=True)


class TrainingSet:
    """Rows to train on or to measure with; a row is an index into the images."""

    def __init__(
        self,
        checkpoint: SDCheckpoint,
        real: RealImages,
        classes: Sequence[str],
        visual: torch.Tensor | None,
        options: LoraOptions,
    ):
        """
        Args:
            visual: token of each image, float32 [N, D]; None: prompts have none.
            options: the prompts' templates, and whether what was computed once is kept.
        """
        self._checkpoint, self.images = checkpoint, real.images
        self.labels = torch.from_numpy(real.labels)
        self._prompts = [
            prompts.fill(options.prompt, options.captioned_prompt, classes[label], (text or "").strip())
            for label, text in zip(real.labels, real.captions, strict=True)
        ]
        self._visual = visual
        tokens = [b""] * len(self.labels) if visual is None else [token.numpy().tobytes() for token in visual.cpu()]
        first: dict[tuple[str, bytes], int] = {}
        keys = zip(self._prompts, tokens, strict=True)
        self._alike = [first.setdefault(key, row) for row, key in enumerate(keys)]  # the first row told the same
        kept = lru_cache(maxsize=None if options.cache else 0)
        self._latents: Callable[[int], torch.Tensor] = kept(
            lambda row: checkpoint.encode(real.images[row : row + 1]).cpu()
        )
        self._conditions: Callable[[int], Conditions] = kept(self._condition)

    def latents(self, rows: torch.Tensor) -> torch.Tensor:
        """Scaled latents float32 [B, C, h, w] of rows int64 [B], on the checkpoint's device."""
        return torch.cat([self._latents(row) for row in rows.tolist()]).to(self._checkpoint.device)

    def conditions(self, rows: torch.Tensor) -> Conditions:
        """Prompts, with their visual tokens, of rows int64 [B], on the checkpoint's device."""
        rows = Conditions.cat([self._conditions(self._alike[row]) for row in rows.tolist()])
        return rows.to(self._checkpoint.device)

    def _condition(self, row: int) -> Conditions:
        visual = None if self._visual is None else self._visual[row : row + 1]
        return self._checkpoint.conditions([self._prompts[row]], visual).to("cpu")
