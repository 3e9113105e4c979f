"""What is measured of synthetic clips beside real ones: distances in a feature network, and diversity.

Knows nothing of where the clips come from, nor of who is told.
"""

from __future__ import annotations

import torch
from pydantic import BaseModel

from trainer.settings import VideoMeasureConfig
from trainer.video_quality.clip_set import ClipSet
from trainer.video_quality.diversity import Diversity, PerceptualNetwork, diversity, open_perceptual
from trainer.video_quality.features import FRAMES, FeatureNetwork, features_of, open_network
from trainer.video_quality.quality import Quality, quality


class Assessment(BaseModel):
    """None: not asked for."""

    features: str | None  # network of the distances
    quality: Quality | None
    diversity: Diversity | None

    def measured(self) -> dict[str, object]:
        """As fields of a line of metrics.jsonl."""
        found: dict[str, object] = {}
        if self.quality is not None:
            told = self.quality.model_dump()
            found |= {name: told[name] for name in ("fvd", "sfvd", "tfvd")} | {"fvd_features": self.features}
        return found if self.diversity is None else found | {"diversity": self.diversity.model_dump()}


def assess(config: VideoMeasureConfig, made: ClipSet, real: ClipSet, device: torch.device) -> Assessment:
    """Measure what the settings ask for. `made` and `real` have a clip at least.

    Raises:
        ConfigError: a network or its weights are not to be had, or do not take the clips.
    """
    network, perceptual = opened(config, device)
    distances = None
    if network is not None:
        generated, others = (features_of(network, clips, config.batch_size) for clips in (made, real))
        distances = quality(generated, others, (made.subjects, real.subjects), (made.texts, real.texts))
    differences = None
    if perceptual is not None:
        differences = diversity(perceptual, made, config.frames or FRAMES, config.pairs)
    return Assessment(features=config.features, quality=distances, diversity=differences)


def opened(config: VideoMeasureConfig, device: torch.device) -> tuple[FeatureNetwork | None, PerceptualNetwork | None]:
    """The networks that the settings name, each None where none is. Raises ConfigError: one is not to be had."""
    network = perceptual = None
    if config.features is not None:
        network = open_network(config.features, device, config.frames, config.size)
    if config.diversity is not None:
        perceptual = open_perceptual(config.diversity, device, config.diversity_weights)
    return network, perceptual
