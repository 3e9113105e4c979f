"""What a rollout is held against: reward features of the real images, and the rewards that are made of them.

The features may be those of a model that a trainer publishes while it learns; then the memory bank follows it. Knows
nothing of how samples come about, nor of what is learnt from their rewards.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from generator_service.published_models import PublishedModels
from generator_service.real_images import RealImages
from generator_service.rl import features, guard, memory_bank, rewards
from generator_service.rl.features import Extractor
from generator_service.rl.rewards import Bank, Reward
from protocol.errors import UnknownWeights, WeightsCorrupt
from protocol.published import PublishedModel
from protocol.tuning import TuneJob

log = logging.getLogger(__name__)
ROWS = 64  # whose features are computed between two looks at what else there is to do


@dataclass(frozen=True)
class Verdict:
    """On one rollout of n rows."""

    rewards: torch.Tensor  # float32 [n] in [-1, 1], eq. 11
    components: dict[str, float]  # mean of each raw component
    contributions: dict[str, float]  # weight times mean, of those that have a weight
    diversity: float | None  # mean distance between two samples of an identity; None: no identity has two
    nearest: float  # mean distance to the nearest real feature

    @property
    def total(self) -> float:
        """Comparable between rollouts, which the mean of `rewards` is not: that is about 0 in each."""
        return sum(self.contributions.values())


class Judge:
    def __init__(
        self,
        job: TuneJob,
        functions: Mapping[str, Reward],
        real: RealImages,
        published: PublishedModels,
        device: torch.device,
        holder: str,
    ):
        """`holder`: in whose name versions of published models are kept while a checkpoint refers to them."""
        self._job, self._functions, self._real = job, functions, real
        self._weights = {name: term.weight for name, term in job.rewards.items()}
        self._published, self._device, self._holder = published, device, holder
        self._pinned: list[PublishedModel] = []
        self._bank: Bank | None = None
        self.extractor: Extractor | None = None  # None: not opened

    def open(self, exactly: str | None = None) -> Generator[object, None, None]:
        """Read the model of the features, and build the bank; yields between batches. Raises as `open_extractor`.

        Args:
            exactly: the version to begin with; None, or when it is not kept any more: the newest.
        """
        try:
            extractor = self._opened(exactly or self._job.features)
        except (UnknownWeights, WeightsCorrupt) as error:
            if exactly is None:
                raise
            log.warning("the newest version is used instead: %s", error.message)
            extractor = self._opened(self._job.features)
        yield from self._use(extractor)

    def _opened(self, source: str) -> Extractor:
        size, published = self._job.features_size, self._published
        return features.open_extractor(
            source, pretrained=self._job.pretrained, size=size, published=published, device=self._device
        )

    def refresh(self) -> Generator[object, None, None]:
        """Follow the model that the features are of, if a newer one is published and whole."""
        assert self.extractor is not None
        try:
            newer = features.newer(self.extractor, self._published)
        except (UnknownWeights, WeightsCorrupt) as error:
            log.warning("the reward keeps its present features: %s", error.message)
            return
        if newer is not None:
            yield from self._use(newer)

    @property
    def features(self) -> dict[str, Any]:
        """What the features are of: name, version (None: timm's), digest, and what opens just these again."""
        found = self.extractor
        assert found is not None
        return {"name": found.name, "version": found.version, "digest": found.digest, "exactly": found.exactly}

    def _use(self, extractor: Extractor) -> Generator[object, None, None]:
        if extractor.published is not None:
            self._published.pin(extractor.published, self._holder)
            self._pinned.append(extractor.published)
        build = memory_bank.build(extractor, self._real, ROWS)
        self._bank = yield from build
        self.extractor = extractor

    def let_go(self, *, all_of_them: bool = False) -> None:
        """Of the versions that no checkpoint refers to any more: all but the present one, or that one, too."""
        kept = 0 if all_of_them else 1
        for model in self._pinned[: len(self._pinned) - kept]:
            self._published.unpin(model, self._holder)
        self._pinned = self._pinned[len(self._pinned) - kept :]

    def judge(self, images: np.ndarray, labels: torch.Tensor) -> Generator[object, None, Verdict]:
        """Images uint8 [n, H, W, 3], labels int64 [n]. Raises GenerationFailed when a reward fails."""
        assert self.extractor is not None and self._bank is not None
        found = []
        for start in range(0, len(images), ROWS):
            found.append(self.extractor(images[start : start + ROWS]))
            yield
        made = torch.cat(found)
        measured = rewards.measure(self._functions, self._weights, rewards.Generated(made, labels, images), self._bank)
        return Verdict(
            measured.total,
            {name: float(values.mean()) for name, values in measured.components.items()},
            rewards.contributions(measured.components, self._weights),
            guard.diversity(made, labels),
            float(guard.nearest(made, self._bank).mean()),
        )
