"""Tiny rendered people: each wears two woven patterns of their own; cameras differ in tint and light."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

HEIGHT, WIDTH, CAMERAS = 32, 16, 3


def render(person: int, camera: int, rng: np.random.Generator, size: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray:
    """uint8 [H, W, 3]; of a person only the patterns' waves are constant, of a camera only tint and light."""
    own, view = np.random.default_rng([7, person]), np.random.default_rng([11, camera])
    y, x = np.mgrid[: size[0], : size[1]]
    waves = own.uniform(0.3, 2.2, (2, 2)) * own.choice([-1.0, 1.0], (2, 2))
    parts = [np.sin(fy * y + fx * x + rng.uniform(0, 6.28)) for fy, fx in waves]
    pattern = np.where(y < size[0] // 2, *parts)
    picture = view.uniform(70, 180, 3) + view.uniform(20, 60, 3) * pattern[..., None]
    return (picture + rng.normal(0, 6, picture.shape)).clip(0, 255).astype(np.uint8)


def write_market(root: Path, *, learnt: int = 16, searched: int = 12, each: int = 4) -> Path:
    """Market-1501's folders: people 1 to `learnt` to train on, others to find, a query each by the first camera."""
    rng = np.random.default_rng(0)
    for folder in ("bounding_box_train", "query", "bounding_box_test"):
        (root / folder).mkdir(parents=True)
    for person in range(1, learnt + searched + 1):
        for camera in range(CAMERAS):
            for number in range(each):
                trained = person <= learnt
                query = not trained and camera == 0 and number == 0
                folder = "bounding_box_train" if trained else "query" if query else "bounding_box_test"
                name = f"{person:04d}_c{camera + 1}s1_{number:06d}_00.jpg"
                Image.fromarray(render(person, camera, rng)).save(root / folder / name, quality=95)
    return root


def write_faces(root: Path, *, learnt: int = 24, verified: int = 20, each: int = 6) -> Path:
    """Class folders `train/<person>` and a list of pairs of other people, `pairs.csv`, in ten folds."""
    rng, size, lines = np.random.default_rng(1), (24, 24), []
    for person in range(learnt):
        (root / "train" / f"p{person:02d}").mkdir(parents=True)
        for number in range(each):
            picture = render(person, number % CAMERAS, rng, size)
            Image.fromarray(picture).save(root / "train" / f"p{person:02d}" / f"{number}.png")
    (root / "pairs").mkdir()
    for person in range(100, 100 + verified):
        for number in range(each):
            Image.fromarray(render(person, number % CAMERAS, rng, size)).save(root / "pairs" / f"{person}_{number}.png")
    for index in range(verified):
        for number in range(each - 1):
            person, other = 100 + index, 100 + (index + 1 + number) % verified
            fold = index * 10 // verified
            lines += [f"{person}_{number}.png,{person}_{number + 1}.png,1,{fold}"]
            lines += [f"{person}_{number}.png,{other}_{number + 1}.png,0,{fold}"]
    (root / "pairs" / "pairs.csv").write_text("first,second,same,fold\n" + "\n".join(lines) + "\n")
    return root
