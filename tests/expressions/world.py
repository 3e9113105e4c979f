"""A world of drawn faces: people, seven emotions as action units that rise from neutral to their apex, and a long tail.

    drawn = write_dataset(folder, seed=0, size=48, frames=16, split="train")

Everything that a clip shows is known: identity, action units and landmarks of each frame. Splits have people of their
own. Knows nothing of models.

Shapes: M frames, S pixels a side, K action units (`portrait.UNITS`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from tests.expressions.portrait import UNITS, Identity, Pose, backdrop, render

EMOTIONS = ("anger", "disgust", "fear", "happiness", "neutral", "sadness", "surprise")
SCARCE = ("disgust", "fear", "surprise")
LONG_TAIL = {
    "anger": 36,
    "disgust": 5,
    "fear": 6,
    "happiness": 48,
    "neutral": 44,
    "sadness": 40,
    "surprise": 8,
}  # clips of each class
PROTOTYPES: dict[str, dict[str, tuple[float, float]]] = {  # unit: (intensity at the apex, how often it takes part)
    "anger": {"AU04": (0.85, 1), "AU05": (0.4, 0.6), "AU07": (0.7, 1), "AU23": (0.8, 1), "AU17": (0.4, 0.4)},
    "disgust": {"AU09": (0.85, 1), "AU10": (0.6, 0.7), "AU15": (0.5, 0.8), "AU17": (0.5, 0.6), "AU04": (0.35, 0.4)},
    "fear": {
        **{"AU01": (0.8, 1), "AU02": (0.5, 0.8), "AU04": (0.5, 0.9), "AU05": (0.8, 1), "AU07": (0.3, 0.4)},
        **{"AU20": (0.8, 1), "AU25": (0.6, 0.9), "AU26": (0.3, 0.4)},
    },
    "happiness": {"AU06": (0.7, 0.9), "AU12": (0.85, 1), "AU25": (0.6, 0.6), "AU14": (0.3, 0.2)},
    "neutral": {},
    "sadness": {"AU01": (0.7, 1), "AU04": (0.5, 0.8), "AU15": (0.8, 1), "AU17": (0.5, 0.6)},
    "surprise": {"AU01": (0.8, 1), "AU02": (0.85, 1), "AU05": (0.6, 0.9), "AU25": (0.5, 1), "AU26": (0.8, 1)},
}
FLAWS = ("faceless", "dark", "blurred")  # of clips that no first frame should come from


@dataclass(frozen=True)
class Clip:
    """What was drawn, and all that is true of it."""

    frames: np.ndarray  # uint8 [M, S, S, 3]
    landmarks: np.ndarray  # float32 [M, 68, 2] in pixels (x, y); of a faceless clip where they would be
    units: np.ndarray  # float64 [M, K] in [0, 1]
    emotion: str
    who: Identity
    caption: str  # who is seen
    flaw: str | None
    relative: str = ""  # path below the dataset's root; "": not written


def draw(
    emotion: str,
    who: Identity,
    *,
    seed: int,
    size: int = 48,
    frames: int = 16,
    flaw: str | None = None,
    apex: Mapping[str, float] | None = None,
) -> Clip:
    """A clip from neutral to an apex; timing, head movement and light follow from the seed.

    Args:
        apex: intensity of each unit at the end; None: drawn from the emotion's prototype.
    """
    rng = np.random.default_rng([seed, EMOTIONS.index(emotion), *who.name.encode()])
    units = performance(prototype(emotion, rng) if apex is None else apex, frames, rng)
    pictures, points = zip(
        *(render(who, unit, pose, size) for unit, pose in zip(units, _poses(frames, rng), strict=True)), strict=True
    )
    clip = np.stack([backdrop(who, size)] * frames if flaw == "faceless" else pictures)
    return Clip(_seen(clip, rng, flaw), np.stack(points), units, emotion, who, description(who), flaw)


def prototype(emotion: str, rng: np.random.Generator) -> dict[str, float]:
    """Units of one person's way to show an emotion, with their intensities."""
    strength, shown = rng.uniform(0.45, 1.0), {}
    for unit, (intensity, often) in PROTOTYPES[emotion].items():
        if rng.random() < often:
            shown[unit] = min(1.0, strength * intensity * rng.uniform(0.75, 1.25))
    return shown


def performance(apex: Mapping[str, float], frames: int, rng: np.random.Generator) -> np.ndarray:
    """Units [M, K]: neutral in the first frame, at the apex in the last; some people blink on the way."""
    begin, last = rng.uniform(0.0, 0.2), rng.uniform(0.4, 0.8)
    rise = np.clip((np.linspace(0, 1, frames) - begin) / last, 0, 1)
    units = np.zeros((frames, len(UNITS)))
    for unit, intensity in apex.items():
        units[:, UNITS.index(unit)] = intensity * rise**2 * (3 - 2 * rise)
    if frames > 3 and rng.random() < 0.15:
        units[rng.integers(1, frames - 1), UNITS.index("AU45")] = 1.0
    return units


def description(who: Identity) -> str:
    """Such as "a woman with long hair and glasses"."""
    noun = "man" if who.beard else "woman" if who.style == "long" else "person"
    hair = [] if who.style == "bald" else ["a fringe" if who.style == "fringe" else f"{who.style} hair"]
    seen = [*hair, *["glasses"] * who.glasses, *["a beard"] * who.beard]
    bald = "bald " if who.style == "bald" else ""
    return f"a {bald}{noun}" + (f" with {' and '.join(seen)}" if seen else "")


def _poses(frames: int, rng: np.random.Generator) -> list[Pose]:
    """A place for the head, and a slow drift from there."""
    start, drift = rng.normal(0, (0.05, 0.05, 0.04, 0.03)), rng.normal(0, (0.03, 0.03, 0.02, 0.015))
    return [Pose(x, y, roll, 1 + scale) for x, y, roll, scale in start + np.linspace(0, 1, frames)[:, None] * drift]


def _seen(frames: np.ndarray, rng: np.random.Generator, flaw: str | None) -> np.ndarray:
    """As a camera sees it: light, and what is wrong with the clip."""
    light = rng.uniform(0.85, 1.1) * (0.1 if flaw == "dark" else 1.0)
    if flaw == "blurred":
        blur = ImageFilter.GaussianBlur(frames.shape[1] / 14)
        frames = np.stack([np.asarray(Image.fromarray(frame).filter(blur)) for frame in frames])
    return (light * frames).clip(0, 255).round().astype(np.uint8)


def people(split: str, seed: int, count: int) -> list[Identity]:
    """Those of a split, the same for every call."""
    return [Identity.drawn(f"{split}-{number:03d}", seed) for number in range(count)]


def clips(
    *,
    seed: int,
    size: int = 48,
    frames: int = 16,
    counts: Mapping[str, int] = LONG_TAIL,
    split: str = "train",
    subjects: int | None = None,
    flawed: int = 0,
) -> Iterator[Clip]:
    """Clips in order of class; see `write_dataset`."""
    known = people(split, seed, subjects or max(2, sum(counts.values()) // 4))
    rng = np.random.default_rng([seed, *split.encode()])
    for emotion, count in counts.items():
        for _ in range(count):
            yield draw(
                emotion, known[rng.integers(len(known))], seed=int(rng.integers(2**31)), size=size, frames=frames
            )
    for number in range(flawed):
        who, own = known[rng.integers(len(known))], int(rng.integers(2**31))
        yield draw("neutral", who, seed=own, size=size, frames=frames, flaw=FLAWS[number % len(FLAWS)])


def write_dataset(
    folder: Path,
    *,
    seed: int,
    size: int = 48,
    frames: int = 16,
    counts: Mapping[str, int] = LONG_TAIL,
    split: str | None = "train",
    subjects: int | None = None,
    flawed: int = 0,
) -> list[Clip]:
    """Write clips in the layout "clips": `folder[/split]/<class>/<clip>/<frame>.png` and `metadata.jsonl`.

    Args:
        counts: clips of each class.
        split: whose people differ from those of every other split; None: no sub-folder.
        subjects: how many people there are; None: one for every four clips.
        flawed: neutral clips more, in turn without a face, dark and blurred.

    Returns:
        What was drawn, each with its path below `folder`.
    """
    root = folder if split is None else folder / split
    drawn, lines = [], []
    options = {"seed": seed, "size": size, "frames": frames, "counts": counts, "subjects": subjects, "flawed": flawed}
    for number, clip in enumerate(clips(split=split or "train", **options)):
        inside = f"{clip.emotion}/{clip.flaw or 'clip'}-{number:04d}"
        (root / inside).mkdir(parents=True)
        for index, frame in enumerate(clip.frames):
            Image.fromarray(frame).save(root / inside / f"{index:03d}.png", compress_level=1)
        row = {"file_name": inside, "label": clip.emotion, "subject": clip.who.name, "caption": clip.caption}
        lines.append(json.dumps(row))
        drawn.append(Clip(**(vars(clip) | {"relative": (root / inside).relative_to(folder).as_posix()})))
    (root / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return drawn
