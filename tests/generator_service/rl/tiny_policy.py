"""The real DiT policy on a tiny checkpoint with random weights, and what sampling and learning need beside it."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from generator_service.rl import rollout
from generator_service.rl.dit_policy import DiTPolicy
from generator_service.rl.reverse_process import ReverseProcess
from generator_service.rl.rollout import Rollout, Wanted
from generator_service.rl.trajectories import Replay, Ring, Trajectories, Transitions
from generator_service.rl.update import Learner
from protocol.tuning import TuneJob
from tests.generator_service.tiny_dit import CLASSES, full, open_backend, save_checkpoint

Outcome = TypeVar("Outcome")


def job(**options) -> TuneJob:
    """`rollout`, `update` and the like as in the message; unless said otherwise few steps, and batches of 4."""
    parts = {
        "rollout": {"identities": 3, "samples": 2, "denoising_steps": 3, "batch_size": 4},
        "update": {"batch_size": 4, "learning_rate": 1e-2, "baseline": "none"},
        "features": "timm:resnet18",
        "pretrained": False,
        "features_size": 32,
    }
    for name, value in options.items():
        parts[name] = {**parts.get(name, {}), **value} if isinstance(value, dict) else value
    return TuneJob.model_validate({"name": "tuned", **parts})


def checkpoint(folder: Path, **config) -> Path:
    """With a schedule whose last step is random, too, unless said otherwise (as Stable Diffusion's)."""
    save_checkpoint(folder)
    path = folder / "scheduler" / "scheduler_config.json"
    schedule = json.loads(path.read_text()) | {"set_alpha_to_one": False, "steps_offset": 1} | config
    path.write_text(json.dumps(schedule))
    return folder


def run(pieces: Generator[object, None, Outcome]) -> Outcome:
    """To its end."""
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return end.value


@dataclass
class Tiny:
    policy: DiTPolicy
    process: ReverseProcess
    learner: Learner
    job: TuneJob

    def trajectories(self) -> Trajectories:
        if self.job.policy.keep == "recompute":
            return Replay(self.process)
        space, options = self.policy.space, self.job.rollout
        return Ring(2, 4, options.denoising_steps, space.latent_shape, space.device, self.job.policy.offload)

    def wanted(self, seed: int = 0) -> Wanted:
        options = self.job.rollout
        rng = torch.Generator().manual_seed(seed)
        return rollout.draw(range(len(CLASSES)), options.identities, options.samples, rng)

    def sampled(self, trajectories: Trajectories, wanted: Wanted | None = None) -> Rollout:
        wanted = wanted or self.wanted()
        return run(rollout.sample(self.process, wanted, self.job.rollout.batch_size, trajectories))


def brightness(made: Rollout):
    """An advantage: how bright the sample is, compared with the others'."""
    values = torch.from_numpy(made.images).float().mean((1, 2, 3)) / 255
    values = values - values.mean()

    def advantage(piece: Transitions) -> torch.Tensor:
        return values[piece.rows]

    return advantage


@contextmanager
def opened(folder: Path, wanted: TuneJob | None = None, **settings) -> Iterator[Tiny]:
    wanted = wanted or job()
    backend = open_backend(folder, **settings)
    with DiTPolicy.opened(backend, full(backend), CLASSES, wanted) as policy:
        process = ReverseProcess(policy, wanted.rollout, wanted.update.precision)
        yield Tiny(policy, process, Learner(process, wanted.update), wanted)
