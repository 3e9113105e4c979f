"""What a study runs on, as files: drawn datasets, and the settings of service and trainer.

Knows nothing of what is measured.
"""

from __future__ import annotations

from pathlib import Path

from tests.expressions.world import LONG_TAIL, SCARCE, write_dataset
from tests.studies.expressions.film import FRAMES, SIDE, WINDOW

NEUTRAL = "neutral"
COUNTS = {name: 5 * count // 2 for name, count in LONG_TAIL.items()}  # clips of each class that are learnt
TEST = 20  # clips of each class, of people whom nobody learns
FLAWED = 6  # neutral clips that gates are to leave out

SERVICE = """
[broker]
url = "embedded"

[generator]
port = 0
backend = "ti2v"
threads = 1
max_batch = 16
weights_dir = "{out}/weights"
samples_dir = "{out}/samples"

[generator.ti2v]
checkpoint = "{root}/film"
device = "cpu"
window = {window}

[generator.dataset]
root = "{out}/data"
layout = "clips"
split = "train"

[generator.faces]
reader = "landmarks"
folder = "{out}/faces"
min_side = {side}

[generator.faces.landmarks]
checkpoint = "{root}/landmarks"
device = "cpu"

[agent]
scheduler = "ddim"

[agent.expressions]
frames = {frames}
steps = 10
guidance_scale = {fixed}
intensity = [0.6, 1.0]
clips_per_unit = 12
"""

TRAINER = """
[trainer]
task = "video"
mode = "sync"
seed = {seed}
runs_dir = "{out}/runs"
iterations = 5
warmup_iterations = 1
epochs = 6
batch_size = 16
threads = 1

[trainer.dataset]
root = "{out}/data"
layout = "clips"
split = "train"

[trainer.model]
model = "small_cnn"
image_size = {side}
frames = 4
hidden = 64

[trainer.optimizer]
kind = "adam"
learning_rate = 1e-3
decay_epochs = [18, 25]

[trainer.feedback]
enabled = false

[trainer.feedback.scarcity]
enabled = true
part = 0.1
clips = 6

[trainer.vog]
enabled = false

[trainer.lookahead]
enabled = false

[trainer.service]
answer_timeout_s = 3600.0

[trainer.measure]
corruptions = []
features_per_class = 0

[trainer.measure.video]
features = "torchscript:{root}/judge.ts"
frames = {frames}
size = {side}
"""
# Of all frames alike, of clips that no policy chooses for. At 3, 7 and 11 the judge told 0.50, 0.54 and 0.57 of the
# clips rightly, and 11 distorts some.
FIXED_GUIDANCE = 7.0


def of_policy(root: Path, out: Path, people: int) -> Path:
    """Settings of a service that learns a policy: neutral clips of so many people, and the scarce emotions."""
    if not (out / "data").is_dir():
        counts = {NEUTRAL: people, **dict.fromkeys(SCARCE, 1)}
        write_dataset(out / "data", seed=500, size=SIDE, counts=counts, subjects=2 * people, flawed=FLAWED)
    return _written(SERVICE, root, out, seed=0)


def of_recognition(root: Path, out: Path, seed: int) -> Path:
    """Settings of service and trainer: a long tail to learn, and other people, all emotions alike, to be tested on."""
    if not (out / "data").is_dir():
        write_dataset(out / "data", seed=1000 + seed, size=SIDE, counts=COUNTS, flawed=FLAWED)
        write_dataset(out / "data", seed=1000 + seed, size=SIDE, counts=dict.fromkeys(LONG_TAIL, TEST), split="test")
    return _written(SERVICE + TRAINER, root, out, seed)


def _written(settings: str, root: Path, out: Path, seed: int) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    sizes = {"side": SIDE, "frames": FRAMES, "window": WINDOW, "fixed": FIXED_GUIDANCE}
    (out / "settings.toml").write_text(settings.format(root=root, out=out, seed=seed, **sizes))
    return out / "settings.toml"
