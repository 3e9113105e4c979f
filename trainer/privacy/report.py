"""Examines a subject and writes what it found: `privacy.json`, all numbers, and the page beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from protocol.errors import ConfigError
from trainer.durable import write_durably
from trainer.privacy import spaces
from trainer.privacy.assessment import Assessment, Options, assess
from trainer.privacy.page import page
from trainer.privacy.subject import Subject

PIXELS = "pixels"


def check_out(out: Path) -> None:
    """Raises ConfigError when there is no such place for a page."""
    if not out.absolute().parent.is_dir() or out.suffix == ".json":
        raise ConfigError(
            f"{out} cannot be the page: name an .html file in a folder that exists with --out; its numbers are written "
            "beside it, as .json",
            param="out",
        )


def write(subject: Subject, features: Sequence[str], options: Options, out: Path) -> Assessment:
    """Write the page `out` and its numbers, the same name with `.json`.

    Args:
        features: what images are compared in beside their pixels, as `spaces.named` knows it.

    Raises:
        ConfigError: there is no such space, or no place for `out`. BadFile: a picture cannot be read any more.
        DiskFull.
    """
    check_out(out)
    asked = dict.fromkeys(name for name in features if name != PIXELS)
    compared = [
        spaces.pixels(subject.frame),
        *(spaces.named(name, subject.run, subject.frame.frames) for name in asked),
    ]
    found = assess(subject, compared, options)
    write_durably(out.with_suffix(".json"), found.model_dump_json(indent=2).encode())
    write_durably(out, page(subject, found).encode())
    return found
