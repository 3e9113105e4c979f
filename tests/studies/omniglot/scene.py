"""The scarce domain of one seed, as files: identities to learn with a few drawings each, others to find, and settings.

Knows nothing of what is measured.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tests.studies.omniglot.characters import DRAWERS, Characters

FEW = 5  # drawings of each identity that generator and trainer get
QUERIES = 4  # drawers whose drawings of the others are searched for among those of the rest
SAMPLING = {"num_inference_steps": 10, "guidance_scale": 1.0}

SETTINGS = """
[broker]
url = "embedded"

[generator]
port = 0
backend = "dit"
threads = 1
max_batch = 100
weights_dir = "{out}/weights"
samples_dir = "{out}/samples"

[generator.dit]
checkpoint = "{prior}"

[agent]
init = false  # from noise
perturb = "none"
guidance_scale = {guidance_scale}
steps = {num_inference_steps}
scheduler = "ddim"
unit_size = 100

[agent.adapt]
method = "cold_start"
name = "cold"
steps = 800
batch_size = 64
learning_rate = 0.03
seed = {seed}

[trainer]
task = "reid"
mode = "sync"
seed = {seed}
runs_dir = "{out}/runs"
iterations = 6
warmup_iterations = 1
steps_per_iteration = 60
batch_size = 64
images_per_identity = 4
threads = 1

[trainer.dataset]
root = "{out}/data"
split = "train"

[trainer.model]
model = "timm:resnet10t"
image_size = [32, 32]
shift = 2
query_split = "query"
gallery_split = "gallery"

[trainer.optimizer]
kind = "adam"
learning_rate = 1e-3
decay_epochs = []

[trainer.feedback]
fraction = 0.5
images_per_sample = 4

[trainer.vog]
enabled = false

[trainer.lookahead]
enabled = false
"""


@dataclass(frozen=True)
class Scene:
    settings: Path
    few: Characters  # what generator and trainer learn from
    held_out: Characters  # the same identities by other drawers
    others: Characters  # identities that nobody learns


def stage(target: Characters, prior: Path, out: Path, seed: int) -> Scene:
    """Write data and settings of a seed. Every second character is learnt; who drew the few is drawn by the seed."""
    drawers = np.random.default_rng(seed).permutation(DRAWERS) + 1
    learnt, known = target.names[::2], np.isin(target.labels, range(0, len(target.names), 2))
    given = np.isin(target.drawers, drawers[:FEW])
    queries = np.isin(target.drawers, drawers[:QUERIES])
    few = target.where(known & given, learnt)
    held_out, others = target.where(known & ~given, learnt), target.where(~known, target.names[1::2])
    for split, rows in {
        "train": few,
        "query": target.where(~known & queries, target.names[1::2]),
        "gallery": target.where(~known & ~queries, target.names[1::2]),
    }.items():
        _write(out / "data" / split, rows)
    settings = out / "settings.toml"
    settings.write_text(SETTINGS.format(out=out, prior=prior, seed=seed, **SAMPLING))
    return Scene(settings, few, held_out, others)


def _write(folder: Path, characters: Characters) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for image, label, drawer in zip(characters.images, characters.labels, characters.drawers, strict=True):
        name = f"{characters.names[label]}-{drawer:02d}.png"
        Image.fromarray(image).save(folder / name)
        lines.append(json.dumps({"file_name": name, "label": characters.names[label], "camera": int(drawer)}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
