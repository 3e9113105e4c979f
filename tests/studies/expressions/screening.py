"""What the text-to-video model makes of neutral frames and sentences, measured and seen.

    python -m tests.studies.expressions.screening --out DIR [--steps 10] [--guidance 3]

Action units are read off pixels by the landmark model, emotions told by the judge; people are of the test split.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from agent.expressions.compose import Asked, TemplateComposer
from agent.expressions.knowledge import KnowledgeBase
from agent.expressions.settings import ExpressionsConfig
from generator_service.backends.interface import Row, Sampling, WeightSet
from generator_service.backends.ti2v import Config, TI2VBackend
from generator_service.faces import landmarks
from protocol.messages import WeightsRef
from tests.expressions.portrait import Identity
from tests.expressions.world import EMOTIONS, clips, description, draw, people
from tests.studies.expressions import judge as judging
from tests.studies.expressions.film import FRAMES, SIDE, WINDOW

SEED = 77


def open_backend(folder: Path) -> tuple[TI2VBackend, WeightSet]:
    backend = TI2VBackend(Config(checkpoint=str(folder), device="cpu", window=WINDOW))
    ref = WeightsRef(name="film", version=1, digest="film")
    return backend, WeightSet(ref, backend.name, "full", None, (), backend.folder)


def composed(emotion: str, who: Identity, seed: int, intensity: tuple[float, float]) -> str:
    """A prompt as the service's template composes it."""
    config = ExpressionsConfig(intensity=intensity)
    composer = TemplateComposer(KnowledgeBase.open(config), config)
    return composer.one(Asked("", seed, emotion, description(who), lambda: None)).prompt


def screened(
    backend: TI2VBackend,
    base: WeightSet,
    shown: Sequence[tuple[Identity, str]],
    steps: int,
    guidance: float,
    intensity: tuple[float, float],
) -> np.ndarray:
    """Clips uint8 [n, FRAMES, SIDE, SIDE, 3] of people and emotions, from their neutral frame."""
    rows = [
        Row(
            seed=number,
            label=None,
            prompt=composed(emotion, who, number, intensity),
            guidance_scale=guidance,
            image=draw("neutral", who, seed=SEED, size=SIDE, frames=2).frames[0],
        )
        for number, (who, emotion) in enumerate(shown)
    ]
    sampling = Sampling(steps, "ddim", guided=guidance > 1, frames=FRAMES)
    made = [backend.generate(base, rows[at : at + 16], sampling) for at in range(0, len(rows), 16)]
    return np.concatenate(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 3.0, 6.0])
    parser.add_argument("--people", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    judge = judging.build(options.out / "judge.pt")
    reader = landmarks.LandmarkReader(landmarks.Config(checkpoint=options.out / "landmarks", device="cpu"))
    held_out = list(clips(seed=SEED, size=SIDE, counts=dict.fromkeys(EMOTIONS, 30), split="screened"))
    print(f"the judge is right on {judging.accuracy(judge, held_out):.3f} of drawn clips of other people")
    backend, base = open_backend(options.out / "film")
    shown = [(who, emotion) for emotion in EMOTIONS for who in people("screened", SEED, options.people)]
    labels = np.array([EMOTIONS.index(emotion) for _, emotion in shown])
    for guidance in options.guidance:
        made = screened(backend, base, shown, options.steps, guidance, (0.6, 1.0))
        sheet(made.reshape(len(EMOTIONS), -1, *made.shape[1:]), options.out / f"sheet-{options.steps}-{guidance:g}.png")
        guessed = judging.told(judge, made)
        reading = reader.read(made.reshape(-1, SIDE, SIDE, 3), made[:, 0])
        size = np.linalg.norm(reading.intensity.reshape(len(made), FRAMES, -1), axis=2)
        told = {
            "steps": options.steps,
            "guidance": guidance,
            "judge": float((guessed == labels).mean()),
            "face": float(reading.presence.mean()),
            "by emotion": {
                name: {
                    "judge": round(float((guessed[labels == at] == at).mean()), 2),
                    "|a| by frame": [round(float(v), 2) for v in size[labels == at].mean(0)],
                }
                for at, name in enumerate(EMOTIONS)
            },
        }
        print(json.dumps(told))


def sheet(made: np.ndarray, path: Path) -> None:
    """Clips [emotions, people, M, S, S, 3]: an emotion a row, two people beside each other, enlarged."""
    rows = [np.concatenate([np.concatenate(list(clip), 1) for clip in emotion[:2]], 1) for emotion in made]
    page = Image.fromarray(np.concatenate(rows, 0))
    page.resize((2 * page.width, 2 * page.height), Image.Resampling.NEAREST).save(path)


if __name__ == "__main__":
    main()
