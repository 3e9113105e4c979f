"""Settings of whole runs, one TOML file each, and what they say of themselves. Files that begin with `_` are parts."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

FOLDER = Path(__file__).parent


class RecipeConfig(BaseModel):
    """The table [recipe]: what a recipe is for."""

    model_config = ConfigDict(extra="forbid")

    # GenDataAgent's data set, RL-identity's, or ARGen's; None: another
    paper: (
        Literal[
            "Pets",
            "CUB",
            "Flowers",
            "Birdsnap",
            "Food",
            "IN100",
            "CASIA",
            "Market-1501",
            "CUHK03",
            "DFEW",
            "FERV39k",
            "CK+",
        ]
        | None
    ) = None
    vit: dict[str, Any] = {}  # what the second backbone of Figure 6 changes in [trainer]: "table.key" -> value
    digits_per_class: int | None = Field(default=None, ge=1, le=150)  # draw scikit-learn's digits; None: own images


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("[!_]*.toml"))


def find(name: str) -> Path:
    """The file of a recipe. Raises ArgumentTypeError, which argparse tells, listing those that there are."""
    if name not in names():
        raise argparse.ArgumentTypeError(f"no recipe {name!r}: there are {', '.join(names())}")
    return FOLDER / f"{name}.toml"


def settings_arguments(command: argparse.ArgumentParser, *, required: bool = False) -> None:
    """`--config`, or a recipe in its place, and `--set`."""
    file = command.add_mutually_exclusive_group(required=required)
    file.add_argument("--config", type=Path, help="settings file (TOML)")
    file.add_argument("--recipe", type=find, dest="config", metavar="NAME", help=f"or: {', '.join(names())}")
    command.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE", help="override a setting")


def draw(recipe: RecipeConfig, folder: Path, seed: int) -> list[str]:
    """Write the images that a recipe draws; the overrides that name them, none when it draws none."""
    if recipe.digits_per_class is None:
        return []
    from agent.digits import write_digits  # scikit-learn is for these alone

    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"digits-{recipe.digits_per_class}-{seed}"
    write_digits(data, per_class=recipe.digits_per_class, seed=seed)
    return [f"trainer.dataset.root={json.dumps(str(data))}", 'trainer.dataset.split="train"']
