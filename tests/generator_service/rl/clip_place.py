"""A place to learn a sampling policy in: drawn clips of a few people, a tiny text-to-video model of the real classes,
and a reader of faces that any picture tells something."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from agent.expressions.settings import ExpressionsConfig
from generator_service.backends.interface import WeightSet
from generator_service.backends.ti2v import TI2VBackend
from generator_service.expressions import Expressions
from generator_service.faces.interface import AbsoluteReader, FaceReading, FacesConfig
from generator_service.real_images import RealImages
from generator_service.registry import CLIP_REWARDS
from generator_service.rl.clip_pairs import Source
from generator_service.rl.policy_job import learn_policy
from generator_service.rl.reward_terms import reward_functions
from protocol.dataset import Dataset, DatasetConfig
from protocol.policy import PolicyJob
from tests.expressions import world
from tests.generator_service import tiny_t2v

SIZE = 32
COUNTS = {"neutral": 6, "surprise": 1, "fear": 1}
READER = f"{__name__}:ShadesReader"
SMALL = {
    "name": "chooser",
    "steps": 4,
    "batch_size": 2,
    "candidates": 3,
    "learning_rate": 1e-2,
    "actions": {"steps": [1, 2], "pairs": [(2.0, 2.0), (3.0, 2.0)]},
    "frames": 2,
    "generate_batch": 8,
    "validate_every": 2,
    "validation_pairs": 3,
    "checkpoint_every": 0,
}


class Config(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ShadesReader(AbsoluteReader):
    """The lighter a frame the surer it has a face; the darker its halves are than in the neutral frame, the more they
    move."""

    units = ("AU04", "AU12")
    identity = "shades"
    reads_pixels = True

    def __init__(self, config: Config):
        pass

    def read(self, frames: np.ndarray, neutral: np.ndarray | None = None) -> FaceReading:
        light = _halves(frames)
        from_light = 1.0 if neutral is None else np.repeat(_halves(neutral), len(frames) // len(neutral), axis=0)
        return FaceReading(frames.mean((1, 2, 3)) / 255, self.units, np.clip(from_light - light, 0, 1))


def _halves(frames: np.ndarray) -> np.ndarray:
    """How light the upper and the lower one are, [N, 2]."""
    return np.stack([half.mean((1, 2, 3)) / 255 for half in np.array_split(frames, 2, axis=1)], axis=1)


def policy_job(**more) -> PolicyJob:
    return PolicyJob.model_validate(SMALL | more)


def drawn(folder: Path, counts: dict[str, int] = COUNTS, subjects: int = 4, frames: int = 3) -> Dataset:
    world.write_dataset(folder, seed=0, size=SIZE, frames=frames, counts=counts, split=None, subjects=subjects)
    return Dataset.open(DatasetConfig(root=folder, layout="clips"))


def source(dataset: Dataset, backend: TI2VBackend, **settings) -> Source:
    """Clips begin with the first frames of others."""
    config = ExpressionsConfig(**settings)
    opened = Expressions.open(config, None, dataset, backend)
    return Source(dataset, opened, config, FacesConfig(reader="shades"), "blurry")


class Run:
    """A policy job in a folder of its own; the registry has the reader "shades"."""

    def __init__(self, backend: TI2VBackend, given: Source, place: Path, job: PolicyJob, base: WeightSet | None = None):
        self.folder, self.unfinished = place / "result", place / ".unfinished-1"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.progress, self.pauses = [], 0
        dataset = given.dataset
        assert dataset is not None
        self.pieces = learn_policy(
            backend,
            base or tiny_t2v.full(backend),
            RealImages.read(dataset, backend.native_size()),
            dataset.classes,
            job,
            self.folder,
            self.unfinished,
            rewards=reward_functions(job, CLIP_REWARDS),
            source=given,
        )

    def __iter__(self):
        while True:
            try:
                progress = next(self.pieces)
            except StopIteration as end:
                self.kind, self.metadata = end.value
                return
            self.pauses += progress.loss is None
            self.progress.extend([progress] if progress.loss is not None else [])
            yield progress

    def to_end(self) -> Run:
        for _ in self:
            pass
        return self

    def to_step(self, step: int) -> Run:
        for progress in self:
            if progress.step == step and progress.loss is not None:
                break
        self.pieces.close()
        return self

    @property
    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.folder.iterdir()}

    def told(self, name: str) -> list:
        return [progress.data[name] for progress in self.progress]
