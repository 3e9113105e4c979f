"""A backend that does what the test says, step by step, and writes down what it was asked: for orders of events."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel

from generator_service.backends.interface import Abilities, OnStep, Row, Sampling, WeightSet

CLASSES = ("alpha", "beta", "gamma")


class Config(BaseModel):
    checkpoint: Path  # any folder with a file in it


class ScriptedBackend:
    """Images are filled with their seed. A prompt "boom" raises. While held, each denoising step waits. More rows than
    `fits` are out of memory after their first step."""

    name = "scripted"
    can = Abilities("class", schedulers=("ddim", "dpm-solver"), adaptations=("cold_start",))
    classes = CLASSES

    def __init__(self, config: Config):
        self.folder = config.checkpoint
        self.events: list[tuple] = []
        self.inside = threading.Event()  # a batch has begun
        self.fits: int | None = None  # None: any number of rows
        self._permits = threading.Semaphore(0)
        self._held = False

    def beside_base(self) -> str:
        return ""

    def prompt_length(self, prompt: str) -> None:
        return None

    def native_size(self) -> tuple[int, int]:
        return (8, 8)

    def hold(self) -> None:
        self._held = True
        self.inside.clear()

    def allow(self, steps: int) -> None:
        self._permits.release(steps)

    def release(self) -> None:
        self._held = False
        self._permits.release(1000)

    def load(self, weights: WeightSet) -> None:
        self.events.append(("load", str(weights.ref)))

    def chosen(self, weights: WeightSet, rows: Sequence[Row], sampling: Sampling) -> Sequence[Row]:
        return rows

    def generate(
        self, weights: WeightSet, rows: Sequence[Row], sampling: Sampling, on_step: OnStep = lambda done, total: None
    ) -> np.ndarray:
        self.events.append(("batch", str(weights.ref), [row.seed for row in rows]))
        self.inside.set()
        for step in range(sampling.steps):
            if self._held:
                self._permits.acquire()
            if any(row.prompt == "boom" for row in rows):
                raise RuntimeError("boom")
            self.events.append(("step", step + 1))
            on_step(step + 1, sampling.steps)
            if self.fits is not None and len(rows) > self.fits:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return np.stack([np.full((8, 8, 3), row.seed % 256, dtype=np.uint8) for row in rows])

    @property
    def batches(self) -> list[list[int]]:
        """Seeds of each batch so far, the warm-up left out."""
        return [event[2] for event in self.events if event[0] == "batch"][1:]
