"""A backend with its store of weight sets, as one service has them; and what tuning makes of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from generator_service.backends.dit_checkpoint import write_tables
from generator_service.backends.interface import Row, Sampling, WeightSet
from generator_service.rl.dit_policy import DiTPolicy
from generator_service.rl.sd_policy import StableDiffusionPolicy
from generator_service.weights import WeightStore
from protocol.tuning import PolicyOptions, RolloutOptions, TuneJob
from tests.generator_service import tiny_dit, tiny_sd
from tests.generator_service.rl.test_dit_policy import shaken
from tests.generator_service.tiny_sd import WIDTH

CLASSES = ("x", "y")
MEANS = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0))
TIMES, LABELS = torch.tensor([900, 20]), torch.tensor([0, 1])
PROMPT = "an owl, {class_name}"
GUIDED = Sampling(4, "ddim", guided=True)
MODEL = {"dit": "transformer", "sd": "unet"}  # folder of a model of its own


class Place:
    """A backend with its store of weight sets, as one service has them."""

    def __init__(self, kind: str, folder: Path, checkpoint: Path, **settings):
        self.kind = kind
        tiny = tiny_dit if kind == "dit" else tiny_sd
        self.backend = tiny.open_backend(checkpoint, **settings)
        self.store = WeightStore(folder / "weights", checkpoint, self.backend.name, self.backend.classes)
        self.policy = DiTPolicy if kind == "dit" else StableDiffusionPolicy

    def published(self, base: WeightSet, kind: str, write, name: str, classes=CLASSES) -> WeightSet:
        with self.store.staging() as folder:
            metadata = write(folder) or {}
            return self.store.publish(folder, name, base, kind, classes, metadata)

    def start(self) -> WeightSet:
        """What tuning starts from: the classes of the dataset on a DiT; on Stable Diffusion the checkpoint."""
        if self.kind == "sd":
            return self.store.base
        own, rng = self.backend.checkpoint(self.store.base).tables, torch.Generator().manual_seed(5)
        tables = {name: torch.randn(3, table.shape[1], generator=rng) for name, table in own.items()}
        write = lambda folder: write_tables(tables, folder, self.store.base.ref.digest)  # noqa: E731
        return self.published(self.store.base, "class_embedding", write, "started")

    def real_fake(self) -> WeightSet:
        unet = self.backend.checkpoint(self.store.base).unet

        def write(folder: Path):
            tiny_sd.save_lora(folder, unet, 5, MEANS)
            return {"visual": "class", "image_encoder": "digest"}

        return self.published(self.store.base, "lora", write, "real-fake")

    def tuned(self, base: WeightSet, parameters="lora", seed=1, size=0.3, name="tuned"):
        """A tuned weight set, and what its policy predicted."""
        options = PolicyOptions(parameters=parameters, rank=2)
        job = TuneJob(name=name, policy=options, seed=seed, rollout=RolloutOptions(prompt=PROMPT))
        with self.policy.opened(self.backend, base, CLASSES, job) as policy:
            shaken(policy, seed, size if parameters == "lora" else size / 10)
            with policy.in_use(), torch.no_grad():
                predicted = policy.predict(self.noise(), TIMES, LABELS, 3.0)
            with self.store.staging() as folder:
                kind, metadata = policy.save(folder)
                weights = self.store.publish(folder, name, base, kind, CLASSES, metadata)
        self.store.verify(weights)
        return weights, predicted

    def noise(self) -> torch.Tensor:
        space = self.backend.checkpoint(self.store.base)
        return torch.randn(2, *space.latent_shape, generator=torch.Generator().manual_seed(0))

    def rows(self) -> list[Row]:
        labelled = self.kind == "dit"
        return [
            Row(seed, seed if labelled else None, 3.0, "" if labelled else f"an owl, {name}")
            for seed, name in enumerate(CLASSES)
        ]

    def image(self, weights: WeightSet, scale: float = 1.0) -> torch.Tensor:
        return self.backend.sample(weights, self.rows(), replace(GUIDED, lora_scale=scale))
