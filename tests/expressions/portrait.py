"""Draws a face of given action units: 68 landmarks that the units move, and an anti-aliased picture of them.

Lengths are in eye distances (between the pupils), the origin is between the eyes, y goes down; landmarks are in the
order of iBUG 300-W. Knows nothing of emotions, clips or files.

Shapes: K action units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

UNITS = (
    *("AU01", "AU02", "AU04", "AU05", "AU06", "AU07", "AU09", "AU10", "AU12", "AU14", "AU15", "AU17", "AU20"),
    *("AU23", "AU25", "AU26", "AU45"),
)
SIDE = 3.0  # eye distances that a picture is wide and high
TOP = -1.05  # of the picture
FINER = 4  # times, that it is drawn and then reduced
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Identity:
    """What stays of a person, whatever the face does."""

    name: str
    skin: Colour
    hair: Colour
    lips: Colour
    eyes: Colour
    background: Colour
    style: str  # of the hair: "bald", "short", "long" or "fringe"
    glasses: bool
    beard: bool
    width: float  # of the face, 1: usual
    jaw: float  # length of the lower face, 1: usual
    eye: float  # size of the eyes, 1: usual
    mouth: float  # width of the mouth, 1: usual
    brow: float  # thickness of the brows, 1: usual

    @classmethod
    def drawn(cls, name: str, seed: int) -> Identity:
        rng = np.random.default_rng([seed, *name.encode()])
        tone = rng.uniform(0.42, 1.0)
        skin = tone * np.array([250, 214, 186]) + rng.uniform(-5, 5, 3)
        hair = (np.array([30, 24, 22]), np.array([96, 62, 36]), np.array([206, 170, 96]), np.array([150, 150, 152]))
        looks = hair[rng.choice(4, p=[0.4, 0.3, 0.2, 0.1])] + rng.uniform(-8, 8, 3)
        return cls(
            name=name,
            skin=_colour(skin),
            hair=_colour(looks),
            lips=_colour(skin * (0.78, 0.5, 0.52)),
            eyes=_colour([(60, 40, 26), (50, 84, 128), (70, 96, 60)][rng.choice(3)]),
            background=_colour(rng.uniform(60, 200) + rng.uniform(-25, 25, 3)),
            style=str(rng.choice(["bald", "short", "long", "fringe"], p=[0.1, 0.4, 0.3, 0.2])),
            glasses=bool(rng.random() < 0.25),
            beard=bool(rng.random() < 0.2),
            width=rng.uniform(0.92, 1.08),
            jaw=rng.uniform(0.94, 1.06),
            eye=rng.uniform(0.9, 1.12),
            mouth=rng.uniform(0.88, 1.12),
            brow=rng.uniform(0.8, 1.3),
        )


@dataclass(frozen=True)
class Pose:
    """Where the head is in the picture."""

    x: float = 0.0  # shift, eye distances
    y: float = 0.0
    roll: float = 0.0  # radians
    scale: float = 1.0


def landmarks(who: Identity, units: np.ndarray) -> np.ndarray:
    """The 68 points, float64 [68, 2] in eye distances, of units [K] in [0, 1]."""
    au = dict(zip(UNITS, np.asarray(units, dtype=float), strict=True))
    points = [_jaw(who, au), _brow(au, -1), _brow(au, 1), _nose(au), _eye(who, au, -1), _eye(who, au, 1)]
    return np.concatenate([*points, _mouth(who, au)])


def _jaw(who: Identity, au: dict[str, float]) -> np.ndarray:
    angle = np.linspace(np.pi, 0, 17)
    low = 1.62 * who.jaw + 0.26 * au["AU26"] * np.sin(angle) ** 4
    return np.stack([1.08 * who.width * np.cos(angle) * (1 - 0.12 * np.sin(angle) ** 3), low * np.sin(angle)], 1)


def _brow(au: dict[str, float], side: int) -> np.ndarray:
    """From left to right in the picture."""
    inward = np.linspace(0, 1, 5)  # 1: next to the nose
    x = 0.82 - 0.62 * inward - 0.07 * au["AU04"] * inward
    y = -0.34 - 0.07 * np.sin(np.pi * (0.25 + 0.6 * (1 - inward)))
    y = y - 0.22 * au["AU01"] * inward**2 - 0.2 * au["AU02"] * (1 - inward) ** 1.5 - 0.06 * au["AU02"]
    y = y + 0.15 * au["AU04"] * (0.35 + 0.65 * inward) + 0.06 * au["AU09"] * inward
    return np.stack([side * x, y], 1)[:: -1 if side > 0 else 1]


def _nose(au: dict[str, float]) -> np.ndarray:
    up = 0.1 * au["AU09"] + 0.02 * au["AU10"]
    bridge = np.stack([np.zeros(4), np.array([0.05, 0.22, 0.39, 0.56 - up])], 1)
    x = np.linspace(-1, 1, 5)
    return np.concatenate([bridge, np.stack([(0.22 + 0.04 * au["AU09"]) * x, 0.66 + 0.05 * (1 - x**2) - up], 1)])


def _eye(who: Identity, au: dict[str, float], side: int) -> np.ndarray:
    """Two corners and two points on each lid, clockwise from the left in the picture."""
    upper = who.eye * (0.15 + 0.1 * au["AU05"] - 0.08 * au["AU07"] - 0.02 * au["AU06"])
    lower = who.eye * (0.1 - 0.06 * au["AU07"] - 0.06 * au["AU06"])
    upper = upper * (1 - au["AU45"]) - lower * au["AU45"]  # the upper lid comes down on the lower
    half = 0.27 * who.eye
    x = np.array([-1, -0.4, 0.4, 1, 0.4, -0.4])
    y = np.array([0, -upper, -upper, 0, lower, lower])
    return np.stack([side * 0.5 + half * x, y], 1)


def _mouth(who: Identity, au: dict[str, float]) -> np.ndarray:
    """Twelve points around the lips and eight around the opening, clockwise from the left corner."""
    half = 0.42 * who.mouth + 0.13 * au["AU12"] + 0.15 * au["AU20"] + 0.06 * au["AU14"] - 0.08 * au["AU23"]
    half = half - 0.09 * au["AU26"]
    corner = 1.08 - 0.16 * au["AU12"] + 0.16 * au["AU15"] + 0.04 * au["AU20"] + 0.08 * au["AU26"]
    thick = 0.09 * (1 - 0.6 * au["AU23"] - 0.25 * au["AU20"])
    top = 1.08 - 0.1 * au["AU10"] - 0.05 * au["AU09"] - 0.02 * au["AU25"]  # of the opening
    bottom = 1.08 + 0.09 * au["AU25"] + 0.36 * au["AU26"] - 0.08 * au["AU17"] - 0.02 * au["AU10"]
    bottom = max(bottom, top)
    x = np.array([-1, -0.66, -0.3, 0, 0.3, 0.66, 1, 0.66, 0.3, 0, -0.3, -0.66])
    bend = np.array([0, 0.62, 1, 0.93, 1, 0.62, 0, 0.7, 1, 1.06, 1, 0.7])
    edge = np.where(np.arange(12) < 7, top - thick, bottom + 1.2 * thick)
    outer = np.stack([half * x, corner + (edge - corner) * bend], 1)
    x = np.array([-0.9, -0.4, 0, 0.4, 0.9, 0.4, 0, -0.4])
    bend = np.array([0, 0.9, 1, 0.9, 0, 0.9, 1, 0.9])
    edge = np.where(np.arange(8) < 5, top, bottom)
    return np.concatenate([outer, np.stack([half * x, corner + (edge - corner) * bend], 1)])


def render(who: Identity, units: np.ndarray, pose: Pose, size: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture uint8 [size, size, 3] and its landmarks float32 [68, 2] in pixels (x, y)."""
    page = _Page(who, pose, size)
    points = landmarks(who, units)
    au = dict(zip(UNITS, np.asarray(units, dtype=float), strict=True))
    _head(page, who, points)
    _wrinkles(page, who, au)
    _features(page, who, points)
    picture = page.picture.resize((size, size), Image.Resampling.BOX)
    return np.asarray(picture), page.place(points).astype(np.float32) / FINER


def backdrop(who: Identity, size: int) -> np.ndarray:
    """The picture without anybody in it."""
    return np.asarray(_Page(who, Pose(), size).picture.resize((size, size), Image.Resampling.BOX))


class _Page:
    """A picture that is drawn on in eye distances."""

    def __init__(self, who: Identity, pose: Pose, size: int):
        side = size * FINER
        shade = np.linspace(1.12, 0.8, side)[:, None, None] * np.array(who.background)
        self.picture = Image.fromarray(np.broadcast_to(shade.clip(0, 255), (side, side, 3)).astype(np.uint8))
        self._ink, self._pose, self._unit = ImageDraw.Draw(self.picture), pose, side / SIDE

    def place(self, points: np.ndarray) -> np.ndarray:
        """Eye distances to pixels of the finer picture."""
        pose, centre = self._pose, np.array([0.0, 0.35])
        turn = np.array([[np.cos(pose.roll), np.sin(pose.roll)], [-np.sin(pose.roll), np.cos(pose.roll)]])
        moved = pose.scale * (np.asarray(points) - centre) @ turn + centre + np.array([pose.x, pose.y])
        return self._unit * (moved - np.array([-SIDE / 2, TOP]))

    def fill(self, points: np.ndarray, colour: Colour) -> None:
        self._ink.polygon([tuple(point) for point in self.place(points)], fill=colour)

    def line(self, points: np.ndarray, width: float, colour: Colour) -> None:
        pixels = max(1, round(width * self._unit * self._pose.scale))
        self._ink.line([tuple(point) for point in self.place(points)], fill=colour, width=pixels, joint="curve")


def _head(page: _Page, who: Identity, points: np.ndarray) -> None:
    wide = 1.08 * who.width
    if who.style == "long":
        page.fill(_ellipse(0, 0.25, wide * 1.28, 1.75), who.hair)
    page.fill(np.array([[-0.5, 1.2], [0.5, 1.2], [0.62, 2.4], [-0.62, 2.4]]), _shaded(who.skin, 0.78))
    for side in (-1, 1):
        page.fill(_ellipse(side * wide, 0.15, 0.14, 0.26), _shaded(who.skin, 0.9))
    angle = np.linspace(0, -np.pi, 24)
    crown = np.stack([wide * np.cos(angle), 1.2 * np.sin(angle)], 1)
    page.fill(np.concatenate([points[:17], crown]), who.skin)
    if who.beard:
        inner = np.stack([0.75 * wide * np.cos(angle[::-1]), 0.78 + 0.1 * np.sin(angle)], 1)
        page.fill(np.concatenate([points[2:15], inner[::-1]]), _mixed(who.skin, who.hair, 0.45))
    if who.style != "bald":
        line = -0.62 if who.style == "fringe" else -0.88
        arc = np.stack([1.1 * wide * np.cos(angle), 1.34 * np.sin(angle) - 0.02], 1)
        edge = np.stack([wide * np.linspace(-1, 1, 12), line + 0.5 * np.linspace(-1, 1, 12) ** 4], 1)
        page.fill(np.concatenate([arc, edge]), who.hair)


def _wrinkles(page: _Page, who: Identity, au: dict[str, float]) -> None:
    """Folds of units that move no landmark much."""

    def fold(points: Sequence[tuple[float, float]], strength: float) -> None:
        if strength > 0.05:
            colour = _shaded(who.skin, 1 - 0.45 * min(1.0, strength))
            for side in (-1, 1):
                page.line(np.array(points) * np.array([side, 1]), 0.06, colour)

    fold([(0.1, 0.12), (0.2, 0.22)], au["AU09"])
    fold([(0.12, 0.26), (0.24, 0.36)], au["AU09"])
    fold([(0.3, 0.6), (0.45, 0.78), (0.52, 0.95)], max(au["AU10"], 0.8 * au["AU09"], 0.6 * au["AU12"]))
    fold([(0.34, 0.24), (0.55, 0.28), (0.76, 0.2)], au["AU06"])
    fold([(0.6, 0.98), (0.64, 1.14)], au["AU14"])
    fold([(0.06, -0.32), (0.08, -0.12)], au["AU04"])
    fold([(0.0, 1.36), (0.14, 1.4)], au["AU17"])


def _features(page: _Page, who: Identity, points: np.ndarray) -> None:
    dark = _shaded(who.skin, 0.35)
    page.line(points[[31, 32, 33, 34, 35]], 0.06, _shaded(who.skin, 0.6))
    page.line(points[27:31], 0.04, _shaded(who.skin, 0.84))
    for brow in (points[17:22], points[22:27]):
        page.line(brow, 0.11 * who.brow, _mixed(dark, who.hair, 0.6))
    for eye in (points[36:42], points[42:48]):
        upper, lower = eye[[0, 1, 2, 3]], eye[[0, 5, 4, 3]]
        page.fill(eye, (245, 245, 245))
        for radius, colour in ((0.14, who.eyes), (0.065, (12, 10, 10))):
            ball = _ellipse(eye[:, 0].mean(), -0.01, radius, radius)
            above, below = np.interp(ball[:, 0], *upper.T), np.interp(ball[:, 0], *lower.T)
            page.fill(np.stack([ball[:, 0], np.clip(ball[:, 1], above, np.maximum(above, below))], 1), colour)
        page.line(upper, 0.055, dark)
        page.line(lower, 0.025, _shaded(who.skin, 0.6))
    page.fill(points[48:60], who.lips)
    page.fill(points[60:68], (64, 20, 24))
    opening = points[66, 1] - points[62, 1]
    if opening > 0.06:
        teeth = points[60:65]
        edge = teeth[3:0:-1] + np.array([0, min(0.1, 0.6 * opening)])
        page.fill(np.concatenate([teeth, edge]), (240, 238, 232))
    page.line(points[[60, 61, 62, 63, 64]], 0.03, _shaded(who.lips, 0.5))
    if who.glasses:
        for eye in (points[36:42], points[42:48]):
            page.line(_ellipse(eye[:, 0].mean(), 0.02, 0.37, 0.3), 0.05, (28, 28, 32))
        page.line(np.array([[-0.13, 0.0], [0.13, 0.0]]), 0.05, (28, 28, 32))


def _ellipse(x: float, y: float, wide: float, high: float) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, 33)
    return np.stack([x + wide * np.cos(angle), y + high * np.sin(angle)], 1)


def _colour(values: Sequence[float] | np.ndarray) -> Colour:
    red, green, blue = (int(min(255, max(0, value))) for value in values)
    return red, green, blue


def _shaded(colour: Colour, light: float) -> Colour:
    return _colour([light * part for part in colour])


def _mixed(one: Colour, other: Colour, part: float) -> Colour:
    """`part` of the other."""
    return _colour([(1 - part) * a + part * b for a, b in zip(one, other, strict=True)])
