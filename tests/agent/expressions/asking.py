"""Clips that want prompts, for tests."""

from __future__ import annotations

import numpy as np

from agent.expressions.compose import Asked


def asked(seed: int = 0, class_name: str = "surprise", caption: str | None = None) -> Asked:
    """One whose first frame is grey, and lighter the higher the seed is."""
    return Asked(f"{seed:032x}", seed, class_name, caption, lambda: np.full((8, 8, 3), seed % 256, np.uint8))
