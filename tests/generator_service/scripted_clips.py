"""The scripted backend where it makes clips, with a policy that chooses by the seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from generator_service.backends.interface import Abilities, OnStep, Row, Sampling, WeightSet
from generator_service.service import Service
from generator_service.weights import WeightStore
from protocol.video import GuidanceCurve
from tests.generator_service.scripted import Config, ScriptedBackend

__all__ = ["Config"]  # of backends that stand in this module

CHOICES = ((5, GuidanceCurve(a=3.0, b=2.0)), (20, GuidanceCurve(a=2.0, b=3.0)))


class ScriptedClips(ScriptedBackend):
    """Each clip begins with its row's image; its frame m, from 1, is filled with seed + m."""

    name = "scripted_clips"
    can = Abilities("text", schedulers=("ddim", "euler"), adaptations=(), makes="clip")
    classes = ()

    def __init__(self, config: Config):
        super().__init__(config)
        self.asked: list[tuple[list[Row], Sampling]] = []

    def prompt_length(self, prompt: str) -> tuple[int, int]:
        return len(prompt.split()) + 2, 8

    def chosen(self, weights: WeightSet, rows: Sequence[Row], sampling: Sampling) -> Sequence[Row]:
        if not sampling.policy:
            return rows
        assert weights.kind == "policy"
        return [replace(row, steps=CHOICES[row.seed % 2][0], guidance=CHOICES[row.seed % 2][1]) for row in rows]

    def generate(
        self, weights: WeightSet, rows: Sequence[Row], sampling: Sampling, on_step: OnStep = lambda done, total: None
    ) -> np.ndarray:
        self.asked.append((list(rows), sampling))
        super().generate(weights, rows, sampling, on_step)
        return np.stack([moving(row.image, row.seed, sampling.frames) for row in rows])


def moving(first: np.ndarray, seed: int, frames: int) -> np.ndarray:
    """The clip that a row gets: uint8 [M, 8, 8, 3]."""
    assert first.shape == (8, 8, 3)
    others = [np.full((8, 8, 3), (seed + m) % 256, dtype=np.uint8) for m in range(1, frames)]
    return np.stack([first, *others])


def clips(service: Service) -> ScriptedClips:
    backend = service.loaded.backend
    assert isinstance(backend, ScriptedClips)
    return backend


def publish_policy(weights: WeightStore, name: str = "chooser") -> WeightSet:
    """A set of the kind that chooses steps and guidance."""
    with weights.staging() as folder:
        (folder / "policy.json").write_text("{}")
        return weights.publish(folder, name, weights.base, "policy", (), {})
