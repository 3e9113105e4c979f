"""The landmark model of the study: trained on drawn faces whose landmarks are known, as a user's is on annotated ones.

Its people appear in no dataset of the study. Rewards, neutral frames and every measurement of action units read pixels
through it, never the world's parameters. Knows nothing of generators.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from generator_service.faces.landmark_model import CARD, LandmarkModel
from generator_service.faces.landmark_training import error, train_landmarks
from generator_service.faces.landmarks import Config, LandmarkReader
from tests.expressions.portrait import UNITS
from tests.expressions.world import EMOTIONS, Clip, clips
from tests.studies.expressions.film import SIDE
from tests.studies.small_checkpoint import timed

SEED, CLIPS, FRAMES = 4711, 160, 6  # of the annotated faces; clips of each emotion; frames of each
STEPS = 900


def build(folder: Path, steps: int = STEPS) -> LandmarkModel:
    """Trained, or read from `folder`."""
    if (folder / CARD).exists():
        return LandmarkModel.load(folder)
    drawn = _drawn(SEED, "annotated", CLIPS, flawed=60)
    frames, points = (np.concatenate([getattr(clip, name) for clip in drawn]) for name in ("frames", "landmarks"))
    faces = np.repeat([clip.flaw != "faceless" for clip in drawn], FRAMES)
    neutral = np.concatenate([clip.units.max(1) == 0 for clip in drawn])

    def report(step: int, loss: float) -> None:
        if step % 50 == 0:
            print(f"  landmarks step {step} of {steps}: loss {loss:.3f}", flush=True)

    with timed("landmark model"):
        return train_landmarks(
            *(frames, points, faces, folder),
            **{"steps": steps, "batch_size": 48, "model": "resnet10t", "stage": 2, "size": 48},
            neutral=neutral,
            device="cpu",
            on_step=report,
        )


def measure(folder: Path) -> dict[str, object]:
    """Error on people that the model has not seen, and how its intensities follow the true ones."""
    reader = LandmarkReader(Config(checkpoint=folder, device="cpu"))
    drawn = _drawn(SEED + 1, "held-out", 12, flawed=9)
    shown, empty = ([clip for clip in drawn if (clip.flaw == "faceless") is none] for none in (False, True))
    told = {
        "normalised mean error": error(
            reader.model, *(np.concatenate([getattr(c, name) for c in shown]) for name in ("frames", "landmarks"))
        ),
        "presence, faces": float(np.mean([reader.read(clip.frames).presence.mean() for clip in shown])),
        "presence, none": float(np.mean([reader.read(clip.frames).presence.mean() for clip in empty])),
    }
    usual = [clip for clip in drawn if clip.flaw is None]
    found = np.concatenate([reader.read(clip.frames, clip.frames[:1]).intensity for clip in usual])
    true = np.concatenate([clip.units for clip in usual])
    correlation = {}
    for at, unit in enumerate(reader.units):
        own = true[:, UNITS.index(unit)]
        correlation[unit] = round(float(np.corrcoef(found[:, at], own)[0, 1]), 3)
    return told | {"correlation": correlation}


def _drawn(seed: int, split: str, each: int, flawed: int) -> list[Clip]:
    counts = dict.fromkeys(EMOTIONS, each)
    return list(clips(seed=seed, size=SIDE, frames=FRAMES, counts=counts, split=split, flawed=flawed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    build(options.out / "landmarks")
    print(json.dumps(measure(options.out / "landmarks"), indent=1))


if __name__ == "__main__":
    main()
