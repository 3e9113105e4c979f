"""What a weight set draws, measured: rewards, a judge's accuracy, diversity. Samples come over HTTP, as anybody's do.

Shapes: n samples, S pixels a side.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from generator_service.published_models import PublishedModels
from generator_service.rl import rewards
from generator_service.rl.features import open_extractor
from protocol import codec
from protocol.client import GeneratorClient
from protocol.messages import ImageGenerationRequest
from tests.studies.omniglot.characters import SIDE, Characters, signed
from tests.studies.omniglot.models import Judge, diversity
from tests.studies.omniglot.scene import SAMPLING, Scene

EACH = 20  # samples of each identity
FIRST_SEED = 1_000_000


def drawn(client: GeneratorClient, weights: str, names: tuple[str, ...], **sampling: float) -> Characters:
    """Samples of every identity."""
    images = []
    for label, name in enumerate(names):
        answer = client.generate(
            ImageGenerationRequest(
                prompt=name, model=weights, n=EACH, seed=FIRST_SEED + label * EACH, **SAMPLING | sampling
            )
        )
        images += [codec.image_from_base64(made.b64_json, max_pixels=2**20)[..., 0] for made in answer.data]
    labels = np.repeat(np.arange(len(names)), EACH)
    return Characters(np.stack(images), labels, np.zeros_like(labels), names)


class Yardstick:
    """Rewards by the published model against the few real drawings; accuracy and diversity by a judge of its own."""

    def __init__(self, scene: Scene, judge: Judge, weights_dir: Path):
        published = PublishedModels(weights_dir / ".published")
        self._extractor = open_extractor(
            "published:reward", pretrained=True, size=None, published=published, device=torch.device("cpu")
        )
        few = scene.few
        self._bank = rewards.Bank(self._extractor(_rgb(few.images)), torch.from_numpy(few.labels))
        self._judge = judge

    def __call__(self, made: Characters) -> dict[str, float]:
        labels = torch.from_numpy(made.labels)
        generated = rewards.Generated(self._extractor(_rgb(made.images)), labels, _rgb(made.images))
        functions = {"semantic": rewards.semantic, "coverage": rewards.coverage, "expression": rewards.expression}
        found = {name: reward(generated, self._bank).mean().item() for name, reward in functions.items()}
        with torch.no_grad():
            features = self._judge.body(signed(made.images))
            accuracy = (self._judge.head(features).argmax(1) == labels).double().mean().item()
        return found | {"judge": accuracy, "diversity": diversity(features.numpy(), made.labels)}


def picture(made: Characters, path: Path) -> None:
    """Ten of each identity, an identity a column."""
    grid = made.images.reshape(len(made.names), -1, SIDE, SIDE)[:, :10]
    sheet = np.concatenate([np.concatenate(list(column), 0) for column in grid], 1)
    Image.fromarray(sheet).resize((2 * sheet.shape[1], 2 * sheet.shape[0]), Image.Resampling.NEAREST).save(path)


def _rgb(images: np.ndarray) -> np.ndarray:
    """uint8 [n, S, S] -> [n, S, S, 3]."""
    return np.repeat(images[..., None], 3, axis=3)
