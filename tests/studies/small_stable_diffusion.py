"""Does LoRA adaptation learn held-out classes? On a small Stable Diffusion of CIFAR photos, in numbers and pictures.

    python -m tests.studies.small_stable_diffusion --data cifar10.npz --out DIR

The checkpoint is trained on some of the classes and saved in DIR/checkpoint; LoRAs then adapt it to the others, with
their own prompts, with shuffled ones, and with and without visual tokens. What DIR holds already is not made again.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from generator_service.adapt.lora import lora
from generator_service.adapt.lora_objective import Objective
from generator_service.adapt.training_set import TrainingSet
from generator_service.adapt.validation import Validation
from generator_service.backends.interface import Row, Sampling, WeightSet
from generator_service.backends.lora_sets import add_lora, read_class_means
from generator_service.backends.sd_checkpoint import SDCheckpoint
from generator_service.backends.stable_diffusion import Config, StableDiffusionBackend
from generator_service.real_images import RealImages
from protocol.messages import AdaptJob, LoraOptions, WeightsRef
from tests.studies.small_checkpoint import WIDTH, Photos, build, prompt, signed, timed, train
from trainer.tasks.small_cnn import SmallCNN

NEW = ("horse", "ship", "truck")  # that the checkpoint has never seen
OLD_PHOTOS = 1500  # of each class that the checkpoint is trained on
PHOTOS, HELD_OUT, MADE = 200, 100, 24  # of each new class: to adapt to, to measure the loss on, to generate
JOB = AdaptJob(method="lora", name="new", steps=150, batch_size=16, learning_rate=2e-3)


class Study:
    def __init__(self, data: Path, out: Path, effort: float):
        photos = Photos.read(data, "train")
        self.out, old = out, [name for name in photos.classes if name not in NEW]
        self.backend = StableDiffusionBackend(
            Config(checkpoint=str(build(out / "checkpoint", photos.of(old, OLD_PHOTOS), effort)), device="cpu")
        )
        ref = WeightsRef(name="base", version=1, digest="small")
        self.base = WeightSet(ref, "stable_diffusion", "full", None, (), self.backend.folder)
        self.train, self.test = photos.of(NEW, PHOTOS), Photos.read(data, "test").of(NEW, HELD_OUT)
        self.judge = Judge(out / "classifier.pt", photos, int(600 * effort))
        self.means = torch.stack(
            [self.judge.features(self.test.images[self.test.labels == at]).mean(0) for at in range(len(NEW))]
        )

    def adapt(self, name: str, visual: str, labels: np.ndarray | None = None) -> WeightSet:
        """A LoRA for the new classes; labels: what the prompts say of each photo, its own class by default."""
        folder = self.out / "adapted" / name
        job = JOB.model_copy(update={"lora": LoraOptions(visual=visual, validation=0.0, checkpoint_every=100)})
        if not folder.is_dir():
            unmade = folder.with_name(f"{name}.unmade")
            shutil.rmtree(unmade, ignore_errors=True)
            unmade.mkdir(parents=True)
            real = _real(self.train, labels)
            with timed(f"adaptation {name}"):
                for _ in lora(self.backend, self.base, real, NEW, job, unmade, folder.with_name(f"{name}.unfinished")):
                    pass
            unmade.rename(folder)
        ref = WeightsRef(name=name, version=1, digest=name)
        return WeightSet(ref, "stable_diffusion", "lora", self.base, NEW, folder, metadata={"visual": visual})

    def loss(self, weights: WeightSet, *, token: bool) -> float:
        """Plain denoising loss on photos of the new classes that no LoRA has seen; token: with the set's own."""
        checkpoint, tokens = SDCheckpoint(self.backend.folder, torch.device("cpu"), torch.float32), None
        if weights.kind == "lora":
            add_lora(checkpoint.unet, weights.folder, "measured")
            checkpoint.use("measured")
        if token:
            tokens = read_class_means(weights.folder, len(NEW), WIDTH)[self.test.labels]
        options = LoraOptions(min_snr_gamma=0.0, cache=False)
        objective = Objective(checkpoint, TrainingSet(checkpoint, _real(self.test), NEW, tokens, options), options)
        return sum(Validation(objective, torch.arange(len(self.test.labels)), batch_size=50, seed=1).losses())

    def generate(self, weights: WeightSet, *, token: bool) -> np.ndarray:
        """Images uint8 [3 * MADE, 32, 32, 3] of the new classes, equal noise for every set."""
        rows = [
            Row(seed=at, label=label if token else None, prompt=prompt(name), guidance_scale=3.0)
            for label, name in enumerate(NEW)
            for at in range(MADE)
        ]
        return self.backend.generate(weights, rows, Sampling(25, "ddim", guided=True))

    def measure(self, images: np.ndarray) -> tuple[float, float]:
        """(mean distance to the own class's mean feature, part that is nearer to it than to the other two)."""
        labels = torch.arange(3).repeat_interleave(MADE)
        distances = 1 - F.normalize(self.judge.features(images), dim=1) @ F.normalize(self.means, dim=1).T
        own = distances.gather(1, labels[:, None])
        return own.mean().item(), (distances.argmin(1) == labels).float().mean().item()

    def picture(self, name: str, images: np.ndarray) -> None:
        """A row of each class, enlarged."""
        grid = images.reshape(3, -1, 32, 32, 3)[:, :12].transpose(0, 2, 1, 3, 4).reshape(3 * 32, -1, 3)
        (self.out / "pictures").mkdir(exist_ok=True)
        Image.fromarray(grid).resize((grid.shape[1] * 2, grid.shape[0] * 2), 0).save(
            self.out / "pictures" / f"{name}.png"
        )


def _real(photos: Photos, labels: np.ndarray | None = None) -> RealImages:
    count = len(photos.labels)
    own = photos.labels if labels is None else labels
    return RealImages(photos.images, own, [str(row) for row in range(count)], [None] * count)


class Judge:
    """A small classifier of all ten classes, whose features no generator is trained with."""

    def __init__(self, path: Path, photos: Photos, steps: int):
        torch.manual_seed(0)
        self._model = SmallCNN(len(photos.classes))
        if path.exists():
            self._model.load_state_dict(torch.load(path, weights_only=True))
        else:
            labels, rng = torch.from_numpy(photos.labels), np.random.default_rng(0)

            def loss() -> Tensor:
                rows = rng.integers(len(labels), size=64)
                return F.cross_entropy(self._model(signed(photos.images[rows])).float(), labels[rows])

            with timed("classifier"):
                train(list(self._model.parameters()), loss, steps, 5e-3, "classifier")
            torch.save(self._model.state_dict(), path)
        self._model.eval()

    @torch.no_grad()
    def features(self, images: np.ndarray) -> Tensor:
        """Of uint8 [B, 32, 32, 3]: float32 [B, 96]."""
        return self._model.features(signed(images))

    @torch.no_grad()
    def accuracy(self, photos: Photos) -> float:
        return (self._model(signed(photos.images)).argmax(1).numpy() == photos.labels).mean()


def arms(study: Study) -> Iterator[tuple[str, WeightSet, bool]]:
    """(what it is, weights, whether prompts have the visual token)."""
    shuffled = np.random.default_rng(0).permutation(study.train.labels)
    yield "no adaptation", study.base, False
    yield "shuffled prompts", study.adapt("shuffled", "none", shuffled), False
    yield "own prompts", study.adapt("own", "none"), False
    with_tokens = study.adapt("tokens", "class")
    yield "own prompts, trained with class tokens: without", with_tokens, False
    yield "own prompts, trained with class tokens: with", with_tokens, True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="archive of JPEGs, as `Photos.read` takes it")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--effort", type=float, default=1.0, help="of the training steps of the checkpoint")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    study = Study(options.data, options.out, options.effort)
    print(f"classifier whose features judge: accuracy {study.judge.accuracy(Photos.read(options.data, 'test')):.3f}")
    table = Table("weights", "held-out loss", "distance to class mean", "nearest mean is its own")
    study.picture("real", study.test.images.reshape(3, -1, 32, 32, 3)[:, :MADE].reshape(-1, 32, 32, 3))
    for name, weights, token in arms(study):
        images = study.generate(weights, token=token)
        distance, own = study.measure(images)
        table.add_row(name, f"{study.loss(weights, token=token):.4f}", f"{distance:.3f}", f"{own:.2f}")
        study.picture(f"{weights.ref.name}{'-token' if token else ''}", images)
    real = study.test.images.reshape(3, -1, 32, 32, 3)[:, :MADE].reshape(-1, 32, 32, 3)
    decoded = study.backend.checkpoint(study.base)
    coded = ((decoded.decode(decoded.encode(real)) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for name, images in (("real photos", real), ("real photos through the autoencoder", coded)):
        distance, own = study.measure(images)
        table.add_row(name, "", f"{distance:.3f}", f"{own:.2f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
