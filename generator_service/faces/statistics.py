"""Which action units a dataset's classes show together, at the apex of their clips (as ARGen's Figures 1b and 7).

The result is mined for what to ask the generator for. Knows nothing of pixels or prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from generator_service.manifest import write_json
from protocol.disk import full_disk_told

FILE = "action_units.json"
STRONGEST = 8  # units of a clip that combinations are formed of, so that their number stays small
MIN_CLIPS = 2  # that share a combination, however small the class


def patterns(
    clips: Sequence[Mapping[str, float]], *, threshold: float, min_support: float, max_units: int
) -> list[dict[str, Any]]:
    """Combinations of action units that are frequent in one class, the most frequent first.

    Args:
        clips: of each clip the intensities at its apex, in [0, 1].
        threshold: intensity from which a unit counts.
        min_support: part of the clips that must show a combination; at least two of them.
        max_units: in a combination.

    Returns:
        Each {"units": {code: mean intensity over the clips that show it}, "part": of the clips}. Only combinations that
        are in no larger frequent one.
    """
    shown = [_strongest(clip, threshold) for clip in clips]
    having: dict[tuple[str, ...], list[int]] = {}
    for at, units in enumerate(shown):
        for size in range(1, max_units + 1):
            for combination in combinations(units, size):
                having.setdefault(combination, []).append(at)
    needed = max(MIN_CLIPS, min_support * len(clips))
    frequent = {combination for combination, found in having.items() if len(found) >= needed}
    inside = {part for one in frequent for part in combinations(one, len(one) - 1)}
    largest = sorted(frequent - inside, key=lambda units: (-len(having[units]), -len(units), units))
    return [
        {
            "units": {
                unit: round(sum(clips[at][unit] for at in having[units]) / len(having[units]), 4) for unit in units
            },
            "part": round(len(having[units]) / len(clips), 4),
        }
        for units in largest
    ]


def _strongest(clip: Mapping[str, float], threshold: float) -> list[str]:
    """Units of a clip that count, sorted by code."""
    counting = [unit for unit, value in clip.items() if value >= threshold]
    return sorted(sorted(counting, key=lambda unit: -clip[unit])[:STRONGEST])


def write(folder: Path, units: Sequence[str], classes: Mapping[str, tuple[int, list[dict[str, Any]]]]) -> Path:
    """Write `action_units.json`: of each class how many clips it was found in, and its patterns. Returns its path."""
    document = {
        "units": list(units),
        "classes": {name: {"clips": clips, "patterns": found} for name, (clips, found) in classes.items()},
    }
    path = folder / FILE
    with full_disk_told(path):
        write_json(path, document)
    return path
